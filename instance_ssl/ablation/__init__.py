"""Variants of one experiment, run over seeds, and what became of them: the paper's tables at any size."""
