"""The whole daemon with the real engine: what no simulator can prove."""
