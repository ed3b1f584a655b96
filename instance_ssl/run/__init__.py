"""One process of a run: parse, check, open, run, end."""
