"""Training heads on features, many at a time."""
