"""One module a stage: each builds from the config and calls the library."""
