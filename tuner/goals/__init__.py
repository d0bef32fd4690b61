"""Constraints, costs, and several objectives."""
