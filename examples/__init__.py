"""Runnable examples. They are part of the checkout, not of the wheel."""
