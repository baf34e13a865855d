"""Real model classes, end to end."""
