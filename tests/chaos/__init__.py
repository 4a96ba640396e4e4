"""Chaos: faults drawn from a seed while clients ask, and what must hold after each (docs/RELIABILITY.md)."""
