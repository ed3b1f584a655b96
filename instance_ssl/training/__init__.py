"""The training step, its engine, schedules and meters."""
