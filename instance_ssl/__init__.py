"""Trains a one-million-way instance classifier for unsupervised visual representation learning (Liu et al., AAAI 2021)."""
