"""A synthetic poster set in the very format of the real one, for demonstrations and tests.

Pictures are pure drawing (Pillow and numpy): genres show in palette, scene, lettering and layout.
As in the real set, genres are unevenly common, go together in the real proportions, and what a
poster shows is not always what its label says. The same seed gives the same bytes.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageEnhance

from ..errors import InputError
from ..staging import staged_folder
from .canvas import BLACK, SUPERSAMPLING, WHITE, Canvas, Colour, Palette, luminance, mix
from .labels import GENRES, genre_share, sample_label_sets
from .lettering import Band, set_small, set_title
from .looks import FIRST_NAMES, LAST_NAMES, LOOKS, TITLE_FORMS
from .scenes import SCENES

# Label noise, set so that a linear model of pixels gains about 17 points of top3_accuracy on the
# three most common genres (600 posters), far from all there is to find.
_SWAPPED_GENRE = 0.04
"""Probability that a label shows as some other genre."""
_HIDDEN_GENRE = 0.02
"""Probability that one of several labels does not show."""
_STRANGE_PALETTE = 0.04
"""Probability of a scene in another genre's colours."""
_MIN_SIDE, _MAX_SIDE = 48, 1024
_JPEG_QUALITY = 88


def draw_posters(
    folder: Path, *, num_images: int = 600, seed: int = 0, size: tuple[int, int] = (182, 268)
) -> None:
    """Draw a poster set: `folder/train.csv` (27 columns) and `folder/Images/<Id>.jpg`.

    `size` is (width, height) in pixels. The folder must not exist or be empty; it appears when all
    is drawn. Raises InputError for a folder in use, fewer than `labels.MIN_IMAGES` posters,
    or a side outside 48 to 1024 pixels.
    """
    if not all(_MIN_SIDE <= side <= _MAX_SIDE for side in size):
        raise InputError(f"{_MIN_SIDE} <= side <= {_MAX_SIDE} must hold, but got {size=}")
    if seed < 0:
        raise InputError(f"seed >= 0 must hold, but got {seed}", where="seed")
    label_sets = sample_label_sets(num_images, np.random.default_rng([seed, 0]))
    with staged_folder(folder) as staging:
        images = staging / "Images"
        images.mkdir()
        with open(staging / "train.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["Id", "Genre", *GENRES])
            for number, labels in enumerate(label_sets, start=1):
                poster_id = f"tt{9_000_000 + number}"
                one_hot = [int(genre in labels) for genre in GENRES]
                writer.writerow([poster_id, str(list(labels)), *one_hot])
                # A generator for each poster: one that draws more does not change the next.
                poster = draw_poster(labels, np.random.default_rng([seed, number]), size)
                poster.save(images / f"{poster_id}.jpg", quality=_JPEG_QUALITY)


def draw_poster(
    labels: tuple[str, ...], rng: np.random.Generator, size: tuple[int, int] = (182, 268)
) -> Image.Image:
    """One RGB poster of `size` (width, height) for a film of these genres, label noise included."""
    shown = _shown_genres(labels, rng)
    palettes = [_tinted_palette(genre, rng) for genre in shown]
    canvas = Canvas(size, palettes[0], rng)
    SCENES[shown[0]](canvas)
    for genre, palette in zip(shown[1:], palettes[1:], strict=True):
        layer = Canvas(size, palette, rng)
        SCENES[genre](layer)
        canvas.image.paste(layer.image, (0, 0), _layout_mask(canvas, last=genre == shown[-1]))
    _set_texts(canvas, shown, palettes[-1])
    return _develop(canvas.image, rng, size)


def _shown_genres(labels: tuple[str, ...], rng: np.random.Generator) -> list[str]:
    """The genres that are drawn, the leading one first: mostly the labels, with noise."""
    shown: list[str] = []
    for genre in labels:
        if rng.random() < _SWAPPED_GENRE:
            genre = GENRES[int(rng.choice(len(GENRES), p=genre_share()))]
        if genre not in shown and (rng.random() >= _HIDDEN_GENRE or len(labels) == 1):
            shown.append(genre)
    shown = shown or [labels[0]]
    # What is rare is what a poster likes to show: a western with drama looks like a western.
    share = dict(zip(GENRES, genre_share(), strict=True))
    weights = np.array([share[genre] ** -0.8 for genre in shown])
    order = rng.choice(len(shown), size=len(shown), replace=False, p=weights / weights.sum())
    return [shown[i] for i in order]


def _tinted_palette(genre: str, rng: np.random.Generator) -> Palette:
    """One of the genre's palettes, every colour moved the same way; sometimes another genre's."""
    if rng.random() < _STRANGE_PALETTE:
        genre = GENRES[int(rng.integers(len(GENRES)))]
    palettes = LOOKS[genre].palettes
    palette = palettes[int(rng.integers(len(palettes)))]
    gain, shift = rng.uniform(0.86, 1.12), rng.integers(-14, 15, size=3)

    def tint(colour: Colour) -> Colour:
        r, g, b = (int(v) for v in np.clip(np.array(colour) * gain + shift, 0, 255))
        return (r, g, b)

    return Palette(
        sky=tint(palette.sky),
        ground=tint(palette.ground),
        ink=tint(palette.ink),
        accent=tint(palette.accent),
        light=tint(palette.light),
    )


def _layout_mask(canvas: Canvas, *, last: bool) -> Image.Image:
    """Where the next genre's scene covers the ones before: white shows it, grey blends."""
    size = (canvas.width, canvas.height)
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    w, h = size
    layout = int(canvas.rng.choice(5, p=(0.26, 0.22, 0.28, 0.16, 0.08)))
    cut = canvas.between(0.4, 0.62)
    if layout == 0:
        lean = canvas.between(-0.2, 0.2)
        draw.polygon([(0, (cut + lean) * h), (w, (cut - lean) * h), (w, h), (0, h)], fill=255)
    elif layout == 1:
        lean = canvas.between(-0.25, 0.25)
        draw.polygon([((cut + lean) * w, 0), (w, 0), (w, h), ((cut - lean) * w, h)], fill=255)
    elif layout == 2:
        ramp = Image.linear_gradient("L").resize(size, Image.Resampling.BILINEAR)
        low, high = 255 * (cut - 0.15), 255 * (cut + 0.15)
        mask = ramp.point(
            [round(255 * min(1, max(0, (v - low) / (high - low)))) for v in range(256)]
        )
    elif layout == 3 and last:
        x, y, r = canvas.between(0.3, 0.7), canvas.between(0.28, 0.5), canvas.between(0.3, 0.42)
        draw.ellipse((x * w - r * w, y * h - r * w, x * w + r * w, y * h + r * w), fill=255)
    else:
        top = canvas.between(0.1, 0.55)
        draw.rectangle((0, top * h, w, (top + canvas.between(0.28, 0.38)) * h), fill=255)
    return mask


def _set_texts(canvas: Canvas, shown: list[str], palette: Palette) -> None:
    """Title, tagline and credits; the last genre shown decides the lettering."""
    rng = canvas.rng
    words = [word for genre in shown for word in LOOKS[genre].words]
    first, second = (words[i] for i in rng.choice(len(words), size=2, replace=False))
    form = TITLE_FORMS[int(rng.integers(len(TITLE_FORMS)))]
    title = form.format(a=first, b=second, n=canvas.count(2, 4))
    low = canvas.chance(0.65)
    tall = canvas.between(0.10, 0.17)
    top = canvas.between(0.62, 0.70) + 0.17 - tall if low else canvas.between(0.05, 0.10)
    band = Band(top=top, bottom=top + tall)
    ground = _mean_colour(canvas.image, band)
    colour = _legible([palette.accent, palette.light, palette.ink], ground)
    rim = BLACK if luminance(colour) > 0.5 else WHITE
    set_title(
        canvas, _broken(title), LOOKS[shown[-1]].lettering, colour, mix(rim, ground, 0.35), band
    )
    small = _legible(
        [palette.light, palette.ink], _mean_colour(canvas.image, Band(top=0.9, bottom=1))
    )
    people = [
        f"{FIRST_NAMES[canvas.count(0, len(FIRST_NAMES) - 1)]} "
        f"{LAST_NAMES[canvas.count(0, len(LAST_NAMES) - 1)]}".upper()
        for _ in range(4)
    ]
    set_small(canvas, "   ".join(people[:3]), small, 0.90, 0.035)
    set_small(canvas, f"A FILM BY {people[3]}   MUSIC {people[0]}", small, 0.945, 0.03)


def _broken(title: str) -> list[str]:
    """The title on one line, or on two of about equal length if it is long."""
    words = title.split()
    if len(title) <= 11 or len(words) == 1:
        return [title]
    cuts = range(1, len(words))
    cut = min(cuts, key=lambda i: abs(len(" ".join(words[:i])) - len(" ".join(words[i:]))))
    return [" ".join(words[:cut]), " ".join(words[cut:])]


def _mean_colour(image: Image.Image, band: Band) -> Colour:
    box = (0, round(band.top * image.height), image.width, round(band.bottom * image.height))
    pixel = image.crop(box).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    assert isinstance(pixel, tuple)
    r, g, b = (int(v) for v in pixel)
    return (r, g, b)


def _legible(colours: list[Colour], ground: Colour) -> Colour:
    """The first colour that stands out from the ground, or white or black."""
    for colour in colours:
        if abs(luminance(colour) - luminance(ground)) > 0.33:
            return colour
    return WHITE if luminance(ground) < 0.5 else BLACK


def _develop(image: Image.Image, rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Shrink to the final size and add what printing and scanning add: contrast, frame, grain."""
    small = image.reduce(SUPERSAMPLING)
    small = ImageEnhance.Contrast(small).enhance(float(rng.uniform(0.85, 1.15)))
    if rng.random() < 0.2:
        shade = tuple(int(v) for v in rng.choice([12, 250], size=1).repeat(3))
        ImageDraw.Draw(small).rectangle((0, 0, size[0] - 1, size[1] - 1), outline=shade, width=5)
    grain = rng.integers(0, 13, size=(size[1], size[0]), dtype=np.uint8)
    layer = Image.fromarray(grain)
    return ImageChops.subtract(small, Image.merge("RGB", (layer, layer, layer)), offset=6)
