"""From a picture file to pixels, for bytes that nobody has vetted.

Everything a person may hand in becomes 8-bit RGB, or an `InputError` that says why not. Size is
checked before any pixel is decoded. The formats are those that Pillow decodes by itself (no
Ghostscript, no fonts). Pillow's own size warning is bypassed by asking its format plugins
directly: silencing it with `warnings` is not safe when pictures are decoded in threads.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import (  # Each of these enters its format into `Image.OPEN`.
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

from ..errors import InputError, unknown_name

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats of Pillow that are read, in the order in which they are tried."""
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""File name endings that belong to `FORMATS`, lower case."""
MAX_PIXELS = 50_000_000
RESIZES = ("squash", "crop")
DECODING = 2
"""Part of the keys of what is kept of pictures: counted up when `decode_square` gives others."""

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True)
class PictureProblem:
    """A picture that cannot be used."""

    row: int
    """Its place in what was checked, from 0."""
    path: Path
    reason: str
    """What is wrong with it, without the path."""


def open_picture(source: bytes | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture completely and bring it to 8-bit RGB, upright.

    Of an animation the first frame is taken; transparency lies over white; 16-bit grey is scaled
    (Pillow's own conversion clips it); the EXIF orientation is applied. Colour profiles are not.

    Args:
        source: the bytes of the file, or its path.
        max_pixels: width x height above this is refused before decoding.

    Raises:
        InputError: missing, empty, truncated, not an image, too large, or of a pixel type that has
            no agreed meaning as a picture (floating point).
    """
    where = str(source) if isinstance(source, Path) else None
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as stream:
            return _decode(stream, max_pixels)
    except InputError as error:
        raise InputError(error.problem, where=where, hint=error.hint) from error.__cause__
    except FileNotFoundError as error:
        raise InputError("the picture is missing", where=where) from error
    except Exception as error:  # Decoders meet hostile bytes with exceptions of every kind.
        raise InputError(f"the picture is damaged ({error})", where=where) from error


def check_pictures(
    paths: Sequence[Path],
    *,
    num_threads: int | None = None,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int, int], None] | None = None,
) -> list[PictureProblem]:
    """Decode every picture and say which ones cannot be used, in the order given.

    Args:
        paths: the pictures; problems count them from 0.
        num_threads: None for one a core, at most 8 (Pillow decodes outside the interpreter lock).
        max_pixels: see `open_picture`.
        progress: called with (done, total) from the calling thread after each picture.
    """
    problems = []

    def reason(path: Path) -> str | None:
        try:
            open_picture(path, max_pixels=max_pixels)
        except InputError as error:
            return error.problem
        return None

    with ThreadPoolExecutor(num_threads or default_threads()) as pool:
        for row, found in enumerate(pool.map(reason, paths)):
            if found is not None:
                problems.append(PictureProblem(row=row, path=paths[row], reason=found))
            if progress is not None:
                progress(row + 1, len(paths))
    return problems


def default_threads() -> int:
    """How many threads decode pictures unless told otherwise."""
    return min(8, os.cpu_count() or 1)


def decode_square(
    image: Image.Image, size: int, *, resize: str = "squash", crop_ratio: float = 1.0
) -> npt.NDArray[np.uint8]:
    """The picture as a square of pixels, [size, size, 3], bicubic with antialiasing.

    Args:
        image: RGB, as `open_picture` returns it.
        size: side in pixels, >= 1.
        resize: `squash` keeps the whole picture and not its proportions; `crop` scales the shorter
            side to size / crop_ratio (rounded) and keeps the centre.
        crop_ratio: share of the shorter side that `crop` keeps, 0 < ratio <= 1.

    The crop is taken in the source's coordinates: the same picture as scaling first, up to half a
    pixel of rounding, without ever holding a scaled copy of a very long strip.
    """
    if resize not in RESIZES:
        raise unknown_name("resize", resize, RESIZES)
    if size < 1 or not 0 < crop_ratio <= 1:
        raise ValueError(
            f"size >= 1 and 0 < crop_ratio <= 1 must hold, got ({size=}, {crop_ratio=})"
        )
    if resize == "squash":
        return _squashed(image, size)
    side = min(image.size) * size / round(size / crop_ratio)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=box), dtype=np.uint8)


def _squashed(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """All of the picture. By torch's vector instructions: Pillow's resizing, in a third of its
    time, takes as long as all else that is done to a picture."""
    import torch
    from torch.nn.functional import interpolate

    # A batch before its axes are turned: only so torch sees that colours lie together, keeps them
    # together, and nothing is copied.
    pixels_1Chw = torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2)
    square_1CSS = interpolate(pixels_1Chw, (size, size), mode="bicubic", antialias=True)
    return np.ascontiguousarray(square_1CSS[0].permute(1, 2, 0).numpy())


def _decode(stream: BinaryIO, max_pixels: int) -> Image.Image:
    image = _open_lazily(stream)
    if image.width * image.height > max_pixels:
        raise InputError(
            f"{image.width} x {image.height} pixels are more than the limit of {max_pixels:,}",
            hint="scale the picture down",
        )
    orientation = _orientation(image)
    image.load()
    image = _to_rgb(image)
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _open_lazily(stream: BinaryIO) -> Image.Image:
    """`Image.open` without its size warning: the header is read, no pixel is."""
    prefix = stream.read(16)
    if not prefix:
        raise InputError("the file is empty")
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        stream.seek(0)
        accepted = accept is None or accept(prefix)
        # A text means that the format is known but its decoder is not built in.
        if accepted and not isinstance(accepted, str):
            return factory(stream, "")
    raise InputError("this is not a picture", hint=f"read are: {', '.join(FORMATS)}")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # A damaged EXIF block says nothing about the pixels, so it is passed over.
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _grey_from_integers(image).convert("RGB")
    if image.mode == "F":
        raise InputError("floating-point pixels have no fixed white", hint="save it with 8 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _grey_from_integers(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits by its full range; 32-bit files that use only 16 bits count as such."""
    values = np.asarray(image).astype(np.float64)
    white = 65535.0 if image.mode != "I" or values.max() <= 65535 else 2.0**31 - 1
    return Image.fromarray(np.rint(values.clip(0, white) * (255 / white)).astype(np.uint8), "L")
