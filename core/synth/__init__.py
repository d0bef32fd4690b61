"""Synthetic film posters: pictures with labels for demos and tests, drawn from nothing."""

from .posters import draw_poster, draw_posters

__all__ = ["draw_poster", "draw_posters"]
