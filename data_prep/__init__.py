"""Benchmark results and what is made of them: readers, labels, supervision. Imports `modeling` only."""
