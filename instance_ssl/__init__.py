"""Unsupervised visual representation learning with a one-million-way instance classifier (Liu et al., AAAI 2021)."""
