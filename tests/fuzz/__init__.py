"""Programs that look for input that breaks what reads it."""
