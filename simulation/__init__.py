"""The parts of simulator.py, the stand-in for `vllm serve`: it imports nothing of the daemon."""
