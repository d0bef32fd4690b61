"""Pictures of every kind that people hand in, good and bad."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from core.errors import InputError
from core.images.pictures import FORMATS, check_pictures, decode_square, open_picture


def _bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _smooth(width: int, height: int) -> Image.Image:
    """Without sharp edges, at which bicubic weights overshoot."""
    y, x = np.mgrid[:height, :width]
    levels = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1)
    return Image.fromarray(levels.astype(np.uint8))


def _png(width: int, height: int, depth: int, colour: int, data: bytes) -> bytes:
    """A PNG written by hand: Pillow cannot write 16-bit colour, nor lie about its size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def _pixels(source: bytes | Path) -> npt.NDArray[np.uint8]:
    image = open_picture(source)
    assert image.mode == "RGB"
    return np.array(image)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_from_bytes_and_path(kind: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (9, 5), (200, 30, 90))
    data = _bytes(image, kind)
    path = tmp_path / "picture"
    path.write_bytes(data)
    assert _pixels(data).shape == (5, 9, 3)
    np.testing.assert_allclose(_pixels(data).reshape(-1, 3).mean(axis=0), (200, 30, 90), atol=3)
    np.testing.assert_array_equal(_pixels(data), _pixels(path))


def test_a_lossless_rgb_picture_is_unchanged() -> None:
    image = _noise(13, 7)
    np.testing.assert_array_equal(_pixels(_bytes(image, "PNG")), np.array(image))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    values = np.array([[0, 128, 257, 25700, 32768, 65535]], dtype=np.uint16)
    pixels = _pixels(_bytes(Image.fromarray(values), kind))
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 0, 1, 100, 128, 255])
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


def test_16_bit_colour_keeps_its_high_bytes() -> None:
    row = b"\0" + struct.pack(">6H", 0x1234, 0xFFFF, 0, 0x8000, 0x00FF, 0x7F00)
    pixels = _pixels(_png(2, 1, 16, 2, row))
    np.testing.assert_allclose(pixels[0], [[0x12, 0xFF, 0], [0x80, 0, 0x7F]], atol=1)


def test_32_bit_grey_by_its_range() -> None:
    small = np.array([[0, 65535]], dtype=np.int32)
    large = np.array([[0, 2**31 - 1]], dtype=np.int32)
    for values in (small, large):
        pixels = _pixels(_bytes(Image.fromarray(values), "TIFF"))
        np.testing.assert_array_equal(pixels[0, :, 0], [0, 255])


def test_cmyk_jpeg() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    np.testing.assert_allclose(_pixels(_bytes(image, "JPEG"))[4, 4], (255, 0, 0), atol=4)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("LA", (0, 0), (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_alpha_lies_over_white(
    mode: str, colour: tuple[int, ...] | int, expected: tuple[int, int, int]
) -> None:
    pixels = _pixels(_bytes(Image.new(mode, (4, 4), colour), "PNG"))
    np.testing.assert_allclose(pixels[2, 2], expected, atol=1)


def test_palettes_with_and_without_transparency() -> None:
    image = Image.new("P", (4, 2), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.putpixel((0, 0), 0)
    np.testing.assert_array_equal(_pixels(_bytes(image, "PNG"))[0, :2], [[0, 0, 0], [10, 200, 30]])
    see_through = _pixels(_bytes(image, "PNG", transparency=0))
    np.testing.assert_array_equal(see_through[0, :2], [[255, 255, 255], [10, 200, 30]])
    by_bytes = _pixels(_bytes(image, "PNG", transparency=b"\x00\xff"))
    np.testing.assert_array_equal(by_bytes[0, :2], [[255, 255, 255], [10, 200, 30]])


def test_one_transparent_colour_of_an_rgb_png() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    pixels = _pixels(_bytes(image, "PNG", transparency=(1, 2, 3)))
    np.testing.assert_array_equal(pixels[0], [[255, 255, 255], [9, 9, 9]])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = _bytes(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames", 1) == 3
    np.testing.assert_array_equal(_pixels(data)[3, 3], (255, 0, 0))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    from PIL import ImageOps

    image = _noise(6, 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _bytes(image, "PNG", exif=exif)
    with Image.open(io.BytesIO(data)) as stored:
        expected = np.array(ImageOps.exif_transpose(stored))
    np.testing.assert_array_equal(_pixels(data), expected)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_a_damaged_exif_block_is_passed_over() -> None:
    data = _bytes(_noise(6, 4), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff garbage")
    assert _pixels(data).shape == (4, 6, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_truncated(kind: str) -> None:
    data = _bytes(_noise(64, 64), kind)
    with pytest.raises(InputError, match="damaged"):
        open_picture(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "the file is empty"),
        (b"<html>404</html>", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (b"\xff\xd8\xff\xe0 only the first bytes", "damaged"),
        (b"\x89PNG\r\n\x1a\n", "damaged"),
        (_png(2, 2, 8, 2, b"\0\1\2"), "damaged"),
    ],
)
def test_not_a_picture(data: bytes, problem: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=problem):
        open_picture(data)
    path = tmp_path / "broken.jpg"
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"broken.jpg: .*{problem}"):
        open_picture(path)


def test_a_missing_picture_names_its_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.jpg: the picture is missing"):
        open_picture(tmp_path / "gone.jpg")


def test_floating_point_pixels_are_refused() -> None:
    data = _bytes(Image.fromarray(np.ones((2, 2), dtype=np.float32)), "TIFF")
    with pytest.raises(InputError, match="floating-point"):
        open_picture(data)


@pytest.mark.parametrize(("width", "height"), [(10_000, 9_500), (40_000, 40_000)])
def test_a_decompression_bomb_is_refused_before_decoding(width: int, height: int) -> None:
    # Both above Pillow's warning (90 MP) and above its error (179 MP); nothing may be warned.
    bomb = _png(width, height, 8, 2, b"")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(InputError, match=f"{width} x {height} pixels are more than the limit"):
            open_picture(bomb)
    assert caught == []


def test_the_limit_of_pixels_is_inclusive() -> None:
    data = _bytes(_noise(10, 10), "PNG")
    assert open_picture(data, max_pixels=100).size == (10, 10)
    with pytest.raises(InputError, match="limit of 99"):
        open_picture(data, max_pixels=99)


def test_any_prefix_and_any_flipped_byte_is_a_picture_or_an_input_error() -> None:
    rng = np.random.default_rng(0)
    for kind in FORMATS:
        data = _bytes(_noise(12, 12), kind)
        for _ in range(60):
            broken = bytearray(data)
            broken[rng.integers(len(data))] = rng.integers(256)
            cut = int(rng.integers(1, len(data) + 1))
            try:
                image = open_picture(bytes(broken[:cut]), max_pixels=1_000_000)
            except InputError:
                continue
            assert image.mode == "RGB"


def test_check_pictures_reports_rows_in_order_and_progress(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    good.write_bytes(_bytes(_noise(8, 8), "PNG"))
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(_bytes(_noise(64, 64), "JPEG")[:900])
    gone = tmp_path / "gone.png"
    seen: list[tuple[int, int]] = []
    problems = check_pictures(
        [good, cut, good, gone],
        num_threads=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [(p.row, p.path) for p in problems] == [(1, cut), (3, gone)]
    assert "damaged" in problems[0].reason
    assert problems[1].reason == "the picture is missing"
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert check_pictures([]) == []


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (31, 31), (8, 300)])
def test_squash_is_a_plain_bicubic_resize(size: tuple[int, int]) -> None:
    """As Pillow's, but for rounding: both keep whole levels between the two directions."""
    image = _smooth(*size)
    expected = np.array(v2.Resize((24, 24), v2.InterpolationMode.BICUBIC)(image)).astype(int)
    pixels = decode_square(image, 24)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable and pixels.flags.c_contiguous
    assert np.abs(pixels - expected).max() <= 2


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (31, 31), (8, 300)])
def test_squash_is_as_near_to_exact_arithmetic_as_pillow(size: tuple[int, int]) -> None:
    image = _noise(*size)
    floats = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].double()
    exact = interpolate(floats, (24, 24), mode="bicubic", antialias=True).clamp(0, 255)
    expected = exact[0].permute(1, 2, 0).numpy()
    pillow = np.array(v2.Resize((24, 24), v2.InterpolationMode.BICUBIC)(image))
    ours = decode_square(image, 24)
    assert np.abs(ours - expected).mean() <= 1.1 * np.abs(pillow - expected).mean()


@pytest.mark.parametrize("size", [(192, 285), (285, 192), (256, 256)])
@pytest.mark.parametrize("crop_ratio", [1.0, 0.875])
def test_crop_matches_scaling_and_then_cropping(size: tuple[int, int], crop_ratio: float) -> None:
    # A smooth picture, as the two differ by up to half a pixel of rounding.
    y, x = np.mgrid[: size[1], : size[0]]
    image = Image.fromarray(
        np.stack([x * 255 // size[0], y * 255 // size[1], (x + y) % 200], axis=-1).astype(np.uint8)
    ).resize(size, Image.Resampling.BICUBIC)
    scaled = v2.Resize(round(64 / crop_ratio), v2.InterpolationMode.BICUBIC)(image)
    expected = np.array(v2.CenterCrop(64)(scaled)).astype(int)
    pixels = decode_square(image, 64, resize="crop", crop_ratio=crop_ratio).astype(int)
    assert pixels.shape == (64, 64, 3)
    assert np.abs(pixels - expected)[..., :2].max() <= 4


def test_cropping_a_long_strip_needs_no_long_copy() -> None:
    strip = Image.new("RGB", (2, 1_000_000), "red")
    assert decode_square(strip, 224, resize="crop").shape == (224, 224, 3)


def test_decode_square_refuses_what_makes_no_sense() -> None:
    image = _noise(8, 8)
    with pytest.raises(InputError, match=r"unknown resize 'stretch'\n  valid: crop, squash"):
        decode_square(image, 8, resize="stretch")
    with pytest.raises(ValueError, match="crop_ratio=0"):
        decode_square(image, 8, resize="crop", crop_ratio=0)
    with pytest.raises(ValueError, match="size=0"):
        decode_square(image, 0)


@pytest.mark.posters
def test_all_real_posters_decode(posters_dir: Path) -> None:
    paths = sorted((posters_dir / "Images").iterdir())
    assert len(paths) > 6_000
    assert check_pictures(paths) == []
