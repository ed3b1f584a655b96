"""The experiment and the DeepSpeed JSON as checked models."""
