"""Frozen backbones: networks, weights, and the features that they compute."""
