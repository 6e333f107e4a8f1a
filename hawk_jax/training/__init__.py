"""Losses, freezing, optimiser, step, loop, checkpoints."""
