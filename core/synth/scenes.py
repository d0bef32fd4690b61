"""What each genre's poster shows: one function a genre, drawing on a canvas in its own palette.

A scene covers the whole canvas and leaves its place, turn and number of things to chance, so that
two posters of one genre share a look and not a layout.
"""

from __future__ import annotations

from collections.abc import Callable

from . import lives, worlds
from .canvas import Canvas

SCENES: dict[str, Callable[[Canvas], None]] = {
    "Action": worlds.action,
    "Adventure": worlds.adventure,
    "Animation": lives.animation,
    "Biography": lives.biography,
    "Comedy": lives.comedy,
    "Crime": worlds.crime,
    "Documentary": lives.documentary,
    "Drama": lives.drama,
    "Family": lives.family,
    "Fantasy": worlds.fantasy,
    "History": lives.history,
    "Horror": worlds.horror,
    "Music": lives.music,
    "Musical": lives.musical,
    "Mystery": worlds.mystery,
    "N/A": lives.unknown,
    "News": lives.news,
    "Reality-TV": lives.reality_tv,
    "Romance": lives.romance,
    "Sci-Fi": worlds.sci_fi,
    "Short": lives.short,
    "Sport": lives.sport,
    "Thriller": worlds.thriller,
    "War": worlds.war,
    "Western": worlds.western,
}
"""Genre to scene: one for every name in `core.synth.labels.GENRES`."""
