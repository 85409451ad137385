"""Memory of a run, planned from a config alone."""
