"""Runs a Program. Knows the IR and torch; knows nothing of passes or solvers."""
