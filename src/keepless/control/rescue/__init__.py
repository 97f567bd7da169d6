"""Out of memory: tighter programs, what is written down, and the optimizer's step."""
