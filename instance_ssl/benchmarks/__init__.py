"""Measurements of the project's own parts beside what people would use instead."""
