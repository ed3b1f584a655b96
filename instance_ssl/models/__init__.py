"""The encoder: a backbone, whose output is evaluated, and a projection, which is trained on and then discarded."""
