"""Runnable stories; part of the checkout, not of the wheel."""
