"""Titles and credits of the synthetic posters: one built-in typeface, made to look like many.

Pillow ships a single scalable font. Weight (a stroke), width (stretching), slant, spacing, tilt of
the single letters and an outline turn it into a genre's lettering.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from ..errors import InputError
from .canvas import Canvas, Colour

_CAP_PX = 64


@dataclass(frozen=True, kw_only=True)
class Lettering:
    """How a genre sets its titles. Lengths are shares of the font's size."""

    weight: float = 0.02
    """Stroke added around each letter."""
    width: float = 1.0
    """Horizontal stretch; below 1 is condensed."""
    slant: float = 0.0
    """Shear to the right, as in italics."""
    spacing: float = 0.02
    """Space added between letters."""
    tilt: float = 0.0
    """Largest random turn of a letter in degrees."""
    upper: bool = True
    """Capitals only."""
    outline: bool = False
    """Letters keep a contrasting rim."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """Where text goes, in shares of the canvas: centred lines between `top` and `bottom`."""

    top: float
    bottom: float
    left: float = 0.07
    right: float = 0.93


def set_title(
    canvas: Canvas,
    lines: list[str],
    lettering: Lettering,
    colour: Colour,
    rim: Colour,
    band: Band,
) -> None:
    """Set the lines under each other, as large as the band allows, each centred."""
    masks = [_letters(line, lettering, canvas.rng) for line in lines]
    room_x = (band.right - band.left) * canvas.width
    room_y = (band.bottom - band.top) * canvas.height / len(masks)
    y = band.top * canvas.height
    for mask in masks:
        wide = mask.width * lettering.width
        scale = min(room_x / wide, 0.9 * room_y / mask.height)
        size = (max(1, round(wide * scale)), max(1, round(mask.height * scale)))
        _stamp(
            canvas,
            mask.resize(size, Image.Resampling.BILINEAR),
            (round((band.left + band.right) / 2 * canvas.width - size[0] / 2), round(y)),
            colour,
            rim,
            outline=lettering.outline,
        )
        y += size[1] + 0.1 * room_y


def set_small(canvas: Canvas, text: str, colour: Colour, y: float, height: float) -> None:
    """One narrow line centred at the height y: taglines, credits."""
    font = _font(_CAP_PX // 2)
    mask = Image.new("L", (round(font.getlength(text)) + 4, 44))
    ImageDraw.Draw(mask).text((2, 0), text, fill=255, font=font)
    tall = max(1, round(height * canvas.height))
    wide = min(round(0.9 * canvas.width), max(1, round(0.62 * mask.width * tall / mask.height)))
    mask = mask.resize((wide, tall), Image.Resampling.BILINEAR)
    at = (round((canvas.width - wide) / 2), round(y * canvas.height))
    canvas.image.paste(colour, (*at, at[0] + wide, at[1] + tall), mask)


def _letters(text: str, lettering: Lettering, rng: np.random.Generator) -> Image.Image:
    """The line as a cropped mask at a fixed size, before stretching."""
    text = text.upper() if lettering.upper else text
    font, stroke = _font(_CAP_PX), round(lettering.weight * _CAP_PX)
    spacing = lettering.spacing * _CAP_PX + 2 * stroke
    advances = [font.getlength(letter) + spacing for letter in text]
    tall, margin = round(1.7 * _CAP_PX), round(0.5 * _CAP_PX)
    mask = Image.new("L", (round(sum(advances)) + 2 * margin, tall))
    draw, x = ImageDraw.Draw(mask), float(margin)
    for letter, advance in zip(text, advances, strict=True):
        lift = float(rng.uniform(-1, 1)) * lettering.tilt
        at = (x, 0.25 * _CAP_PX)
        if lettering.tilt:
            glyph = Image.new("L", (round(advance) + 24, tall))
            pen = ImageDraw.Draw(glyph)
            pen.text((12, at[1]), letter, fill=255, font=font, stroke_width=stroke)
            turned = glyph.rotate(lift, Image.Resampling.BILINEAR)
            left = round(x) - 12
            box = (left, 0, left + turned.width, tall)
            mask.paste(ImageChops.lighter(turned, mask.crop(box)), box)
        else:
            draw.text(at, letter, fill=255, font=font, stroke_width=stroke)
        x += advance
    if lettering.slant:
        shear = (1, lettering.slant, -lettering.slant * tall / 2, 0, 1, 0)
        mask = mask.transform(mask.size, Image.Transform.AFFINE, shear, Image.Resampling.BILINEAR)
    return mask.crop(mask.getbbox())


def _stamp(
    canvas: Canvas,
    mask: Image.Image,
    at: tuple[int, int],
    colour: Colour,
    rim: Colour,
    *,
    outline: bool,
) -> None:
    """Paste the letters over a soft or a hard rim, which keeps them legible on any ground."""
    pad = 8
    framed = Image.new("L", (mask.width + 2 * pad, mask.height + 2 * pad))
    framed.paste(mask, (pad, pad))
    if outline:
        around = framed.filter(ImageFilter.MaxFilter(7))
    else:
        around = framed.filter(ImageFilter.BoxBlur(4)).point([min(255, 2 * v) for v in range(256)])
    left, top = at[0] - pad, at[1] - pad
    box = (left, top, left + framed.width, top + framed.height)
    canvas.image.paste(rim, box, around)
    canvas.image.paste(colour, box, framed)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise InputError(
            "this Pillow cannot draw scalable text (built without FreeType)",
            hint="install Pillow from PyPI: pip install --force-reinstall pillow",
        )
    return font
