"""Training state as hashed, atomic directories; foreign weights; export."""
