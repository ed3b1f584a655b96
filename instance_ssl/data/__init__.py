"""Images, their stable instance ids, and the views the model sees."""
