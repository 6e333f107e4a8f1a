"""Single-device model code: modules hold structure, functions of arrays do the work."""
