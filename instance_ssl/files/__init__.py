"""Reads and writes files that may be damaged: JSON, YAML, lists of names. Checks for disk space."""
