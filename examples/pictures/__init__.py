"""Example in which only the picture decides, because the question is always the same."""
