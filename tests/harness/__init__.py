"""Rank processes for tests: `ranks.py` is the side of the test, `worker.py` that of one rank."""
