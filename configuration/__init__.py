"""Parts of config.py: the table of settings, and the readers of its files."""
