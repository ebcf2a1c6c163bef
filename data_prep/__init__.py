"""Benchmark results and what is made of them: readers, labels, supervision. Imports `modeling` only."""

SPLITS = ("train", "validation", "test")
"""Splits of a supervision, in order."""
