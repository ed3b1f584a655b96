"""Measurements against other implementations of the same thing."""
