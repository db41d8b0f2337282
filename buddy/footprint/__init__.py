"""How much memory training and serving need, from a configuration alone."""
