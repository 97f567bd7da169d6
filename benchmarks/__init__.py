"""Benchmarks: one question per file, answers as CSV in `results/`. Run them on a quiet machine with `make bench`."""
