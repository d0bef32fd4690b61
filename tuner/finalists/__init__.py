"""From the best trials to one model."""
