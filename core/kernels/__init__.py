"""What a step on a CPU computes element by element, compiled by Numba: losses, updates, ranks."""
