"""Features before trials: extraction, and the cache."""
