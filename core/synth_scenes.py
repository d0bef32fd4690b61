"""What each genre's poster shows: one function a genre, drawing on a canvas in its own palette.

A scene covers the whole canvas and leaves its place, turn and number of things to chance, so that
two posters of one genre share a look and not a layout.
"""

from __future__ import annotations

from collections.abc import Callable

from . import synth_lives, synth_worlds
from .synth_canvas import Canvas

SCENES: dict[str, Callable[[Canvas], None]] = {
    "Action": synth_worlds.action,
    "Adventure": synth_worlds.adventure,
    "Animation": synth_lives.animation,
    "Biography": synth_lives.biography,
    "Comedy": synth_lives.comedy,
    "Crime": synth_worlds.crime,
    "Documentary": synth_lives.documentary,
    "Drama": synth_lives.drama,
    "Family": synth_lives.family,
    "Fantasy": synth_worlds.fantasy,
    "History": synth_lives.history,
    "Horror": synth_worlds.horror,
    "Music": synth_lives.music,
    "Musical": synth_lives.musical,
    "Mystery": synth_worlds.mystery,
    "N/A": synth_lives.unknown,
    "News": synth_lives.news,
    "Reality-TV": synth_lives.reality_tv,
    "Romance": synth_lives.romance,
    "Sci-Fi": synth_worlds.sci_fi,
    "Short": synth_lives.short,
    "Sport": synth_lives.sport,
    "Thriller": synth_worlds.thriller,
    "War": synth_worlds.war,
    "Western": synth_worlds.western,
}
"""Genre to scene: one for every name in `core.synth_labels.GENRES`."""
