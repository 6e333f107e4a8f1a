"""Scores, controls and the report."""
