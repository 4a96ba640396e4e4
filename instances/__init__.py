"""The parts of instance_manager.py: what an instance is, how its processes are run, and its state on disk."""
