"""What is measured, against whom, side by side.  `python -m benchmarks --list`; README.md says how to read the results."""
