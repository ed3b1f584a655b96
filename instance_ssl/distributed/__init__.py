"""Process groups, their collectives, and how work is divided over ranks."""
