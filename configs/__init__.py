"""Recipes as data: training, launching, pools."""
