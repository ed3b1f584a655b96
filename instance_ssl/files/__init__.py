"""Reading and writing files that anyone may have damaged: JSON, YAML, lists of names, and room on the disk."""
