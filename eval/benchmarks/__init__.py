"""Benchmarks from their official downloads: the scripts of the folder above."""
