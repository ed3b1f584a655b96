"""Process groups and the integers that divide work over them."""
