"""Benchmark results, their readers, labels and supervision. Imports `modeling` only."""

SPLITS = ("train", "validation", "test")
"""Splits of a supervision, in order."""
