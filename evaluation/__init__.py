"""Evaluation of a composite against every expert alone, the oracle and simple baselines. Imports floors 1 to 3."""
