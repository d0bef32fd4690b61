"""Trained classifiers: saved, served, judged, put together."""
