"""Measurements that anyone can repeat; part of the checkout, not of the wheel."""
