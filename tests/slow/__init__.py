"""Long runs with a simulated or scripted engine: `make slow`."""
