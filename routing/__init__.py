"""The parts of router.py: choosing a backend and carrying the bytes of one exchange."""
