"""How a command starts on a machine: the environment (setup.sh).  Starting on many machines at once belongs here too."""
