"""One small reader per annotation format."""
