"""Nodes that change when or whether a request happens, never what a range contains."""
