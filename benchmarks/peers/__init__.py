"""Keepless beside what a user would otherwise pick, on the same work, in one run: `python -m benchmarks.peers`."""
