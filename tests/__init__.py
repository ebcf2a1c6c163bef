"""Tests, in folders that mirror the package's. `tiny.py` makes their models."""
