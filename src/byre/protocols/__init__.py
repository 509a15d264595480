"""Leaves of the graph: each owns something outside it."""
