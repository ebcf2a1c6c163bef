"""Tests mirror the folders; `tiny.py` makes their models."""
