"""Evaluations of representations: from features and labels to metrics."""
