"""Training of expert tokens: arguments, cached features, methods, plug-in. Imports `modeling` and `data_prep`."""
