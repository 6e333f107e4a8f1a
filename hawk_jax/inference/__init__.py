"""Generation and export of answers."""
