"""Benchmarks from local files: official downloads become JSON lines, which stock lmms-eval tasks read."""
