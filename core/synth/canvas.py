"""A small drawing surface for the synthetic posters: relative coordinates, soft edges, silhouettes.

Everything is drawn at `SUPERSAMPLING` times the final size and shrunk, because Pillow's shapes have
hard edges. x and y run from 0 to 1 over width and height; radii and line widths are shares of the
width. Points are plain (x, y) pairs, colours (r, g, b) of 0 to 255.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

SUPERSAMPLING = 2
WHITE: Colour = (255, 255, 255)
BLACK: Colour = (0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Palette:
    """The five colours of a genre's poster."""

    sky: Colour
    """Top of the background."""
    ground: Colour
    """Bottom of the background."""
    ink: Colour
    """Silhouettes and the foreground."""
    accent: Colour
    """The one loud colour: title, props."""
    light: Colour
    """Sun, lamps, light type."""


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """`share` 0 gives the first colour, 1 the second."""
    r, g, b = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return (r, g, b)


def luminance(colour: Colour) -> float:
    """Perceived brightness, 0 to 1 (Rec. 601 weights)."""
    r, g, b = colour
    return (0.299 * r + 0.587 * g + 0.114 * b) / 255


class Canvas:
    """One picture being drawn, with its palette and its source of chance."""

    def __init__(self, size: tuple[int, int], palette: Palette, rng: np.random.Generator) -> None:
        """`size` is the final (width, height) in pixels; the picture is larger while drawn."""
        self.width, self.height = (SUPERSAMPLING * side for side in size)
        self.palette = palette
        self.rng = rng
        self.image = Image.new("RGB", (self.width, self.height), palette.sky)
        self._draw = ImageDraw.Draw(self.image, "RGBA")

    def between(self, low: float, high: float) -> float:
        """A number drawn evenly from the range."""
        return float(self.rng.uniform(low, high))

    def count(self, low: int, high: int) -> int:
        """A whole number drawn evenly from the range, both ends included."""
        return int(self.rng.integers(low, high + 1))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return bool(self.rng.random() < probability)

    def sky(self, top: Colour | None = None, bottom: Colour | None = None) -> None:
        """Fill with a gradient from top to bottom, leaning a little to one side."""
        top = top or self.palette.sky
        bottom = bottom or self.palette.ground
        lean = self.between(-0.22, 0.22)
        corners = np.array(
            [
                [mix(top, bottom, max(0.0, lean)), mix(top, bottom, max(0.0, -lean))],
                [mix(top, bottom, 0.5 + lean), mix(top, bottom, 0.5 - lean)],
                [mix(top, bottom, min(1.0, 1 + lean)), mix(top, bottom, min(1.0, 1 - lean))],
            ],
            dtype=np.uint8,
        )
        size = (self.width, self.height)
        self.image.paste(Image.fromarray(corners).resize(size, Image.Resampling.BILINEAR))

    def polygon(self, points: Sequence[Point], colour: Colour, alpha: int = 255) -> None:
        """Fill a polygon."""
        self._draw.polygon([self._at(p) for p in points], fill=(*colour, alpha))

    def box(
        self, x0: float, y0: float, x1: float, y1: float, colour: Colour, alpha: int = 255
    ) -> None:
        """Fill an upright rectangle given two corners in any order."""
        left, top = self._at((min(x0, x1), min(y0, y1)))
        right, bottom = self._at((max(x0, x1), max(y0, y1)))
        self._draw.rectangle((left, top, right, bottom), fill=(*colour, alpha))

    def disc(
        self, x: float, y: float, r: float, colour: Colour, alpha: int = 255, squash: float = 1.0
    ) -> None:
        """Fill a circle, or an ellipse whose height is `squash` times its width."""
        self._draw.ellipse(self._around(x, y, r, squash), fill=(*colour, alpha))

    def ring(
        self, x: float, y: float, r: float, colour: Colour, thickness: float, squash: float = 1.0
    ) -> None:
        """Draw a circle or ellipse as a line."""
        self._draw.ellipse(
            self._around(x, y, r, squash), outline=(*colour, 255), width=self._wide(thickness)
        )

    def pie(self, x: float, y: float, r: float, start: float, end: float, colour: Colour) -> None:
        """Fill a sector; angles in degrees, clockwise from the right."""
        self._draw.pieslice(self._around(x, y, r, 1.0), start, end, fill=(*colour, 255))

    def line(
        self, points: Sequence[Point], colour: Colour, thickness: float, alpha: int = 255
    ) -> None:
        """Draw a line through the points, with rounded joints."""
        pixels = [self._at(p) for p in points]
        self._draw.line(pixels, fill=(*colour, alpha), width=self._wide(thickness), joint="curve")

    def limb(self, points: Sequence[Point], colour: Colour, thickness: float) -> None:
        """A line with round ends, for arms, legs and branches."""
        self.line(points, colour, thickness)
        for x, y in (points[0], points[-1]):
            self.disc(x, y, thickness / 2, colour)

    def glow(self, x: float, y: float, r: float, colour: Colour, strength: float = 1.0) -> None:
        """Add a soft round light; `strength` 0 to 1 at the centre."""
        left, top, right, _ = (round(v) for v in self._around(x, y, r, 1.0))
        side = max(2, right - left)
        halo = (
            _halo()
            .resize((side, side), Image.Resampling.BILINEAR)
            .point([round(v * strength) for v in range(256)])
        )
        self.image.paste(colour, (left, top, left + side, top + side), halo)

    def rays(
        self, x: float, y: float, num_rays: int, colour: Colour, alpha: int = 255, turn: float = 0.0
    ) -> None:
        """Wedges from a point to beyond the edges, every second one filled."""
        step = math.pi / num_rays
        for i in range(num_rays):
            start = 2 * i * step + turn
            far = [(x + 2 * math.cos(a), y + 2 * math.sin(a)) for a in (start, start + step)]
            self.polygon([(x, y), *far], colour, alpha)

    def ridge(self, base: float, rise: float, colour: Colour, num_peaks: int = 6) -> None:
        """A jagged skyline of mountains from the height `base` down to the lower edge."""
        xs = np.linspace(-0.05, 1.05, 2 * num_peaks + 1)
        heights = self.rng.uniform(0.45, 1.0, size=xs.size) * rise
        heights[::2] *= 0.35
        tops = [(float(x), base - float(h)) for x, h in zip(xs, heights, strict=True)]
        self.polygon([(-0.05, 1.02), *tops, (1.05, 1.02)], colour)

    def hill(self, base: float, rise: float, colour: Colour) -> None:
        """Rolling ground from the height `base` down to the lower edge."""
        phase, waves = self.between(0, 6.3), self.between(0.6, 1.4)
        xs = np.linspace(0, 1, 25)
        ys = base - rise * np.sin(phase + 6.3 * waves * xs)
        tops = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
        self.polygon([(0, 1.02), *tops, (1, 1.02)], colour)

    def _at(self, point: Point) -> tuple[float, float]:
        return point[0] * self.width, point[1] * self.height

    def _wide(self, share: float) -> int:
        return max(1, round(share * self.width))

    def _around(
        self, x: float, y: float, r: float, squash: float
    ) -> tuple[float, float, float, float]:
        cx, cy = self._at((x, y))
        rx, ry = r * self.width, r * squash * self.width
        return cx - rx, cy - ry, cx + rx, cy + ry


@functools.cache
def _halo() -> Image.Image:
    """White in the centre, black from the inscribed circle outwards."""
    radius = np.hypot(*np.meshgrid(np.linspace(-1, 1, 128), np.linspace(-1, 1, 128)))
    return Image.fromarray((255 * np.clip(1 - radius, 0, 1) ** 1.6).astype(np.uint8))
