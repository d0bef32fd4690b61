"""Views against Pillow and torch. N pictures, B batch, D features, P places."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from core.encoding.inputs import HeadInputs, feature_statistics
from core.images.views import BY_NAME, PLAIN, VIEWS, View, see

N, SIZE = 3, 32


def _pictures(size: int = SIZE) -> np.ndarray:
    """Noise with a slope from side to side: no view of it looks like another."""
    rng = np.random.default_rng(0)
    slope = np.linspace(0, 120, size)[:, None] + np.linspace(0, 60, size)
    return (rng.integers(0, 70, (N, size, size, 3)) + slope[:, :, None]).astype(np.uint8)


def _by_hand(picture: np.ndarray, view: View) -> Image.Image:
    """Pillow's own crop, resize and mirror."""
    image = Image.fromarray(picture)
    if view.corner is not None:
        side = image.width * 7 // 8
        top, left = (corner * (image.width - side) for corner in view.corner)
        cropped = image.crop((left, top, left + side, top + side))
        image = cropped.resize(image.size, Image.Resampling.BICUBIC)
    return ImageOps.mirror(image) if view.mirrored else image


@pytest.mark.parametrize("view", BY_NAME.values(), ids=lambda view: view.name)
def test_a_view_is_what_pillow_makes_of_it(view: View) -> None:
    pictures = _pictures()
    before = pictures.copy()
    seen = see(pictures, view)
    assert seen.dtype == np.uint8
    assert np.array_equal(seen, [np.asarray(_by_hand(picture, view)) for picture in pictures])
    assert np.array_equal(pictures, before)
    torch.from_numpy(seen)  # which takes no negative strides


@pytest.mark.parametrize("view", BY_NAME.values(), ids=lambda view: view.name)
def test_a_view_is_what_torch_makes_of_it(view: View) -> None:
    """By coordinates and with another library's bicubic filter: equal up to rounding, which Pillow
    does after each of the two directions."""
    images = torch.from_numpy(_pictures()).permute(0, 3, 1, 2).float()
    if view.corner is not None:
        start, stop = slice(0, 28), slice(4, 32)
        rows, columns = ((start, stop)[corner] for corner in view.corner)
        crops = images[:, :, rows, columns]
        images = F.interpolate(crops, (SIZE, SIZE), mode="bicubic", antialias=True)
    if view.mirrored:
        images = images.flip(3)
    expected = images.clamp(0, 255).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(see(_pictures(), view), expected, atol=2)


@pytest.mark.parametrize("name", VIEWS)
def test_the_plain_view_comes_first_and_no_view_twice(name: str) -> None:
    views = VIEWS[name]
    assert views[0] is PLAIN
    seen = [see(_pictures(), view) for view in views]
    assert np.array_equal(seen[0], _pictures())
    for one, other in itertools.combinations(seen, 2):
        assert not np.array_equal(one, other)
    assert {view.name for view in views} <= set(BY_NAME)
    assert all(BY_NAME[view.name] is view for view in views)


def test_the_registry_is_what_its_names_say() -> None:
    assert {name: len(views) for name, views in VIEWS.items()} == {
        "plain": 1,
        "flip": 2,
        "flip_crop": 10,
    }
    assert [view.mirrored for view in VIEWS["flip"]] == [False, True]
    assert {view.corner for view in VIEWS["flip_crop"]} == {None, (0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize("size", [17, 48, 50])
def test_sides_that_eight_does_not_divide(size: int) -> None:
    for view in BY_NAME.values():
        assert see(_pictures(size), view).shape == (N, size, size, 3)


@pytest.mark.parametrize("norm", ["standardize", "none"])
@pytest.mark.parametrize("spatial", [False, True])
def test_batches_read_each_row_in_its_view(norm: str, spatial: bool) -> None:
    """Scaled by the statistics of the plain view, and plain where nothing else is said."""
    shape = (600, 4, 5) if spatial else (600, 5)  # more rows than a block
    rng = np.random.default_rng(0)
    matrices = [rng.normal(view, 1 + view, shape).astype(np.float32) for view in range(3)]
    train = np.arange(400, dtype=np.int64)
    inputs = HeadInputs(
        matrices[0], norm=norm, train_rows=train, device="cpu", further_views=matrices[1:]
    )
    rows, views = np.array([7, 599, 7, 0, 3]), np.array([2, 0, 1, 2, 1])
    expected = torch.from_numpy(
        np.stack([matrices[v][r] for r, v in zip(rows, views, strict=True)])
    )
    plain = torch.from_numpy(matrices[0][rows])
    if norm == "standardize":
        mean_D, deviation_D = feature_statistics(matrices[0], train)
        expected, plain = ((x - mean_D) / deviation_D for x in (expected, plain))
    for _ in range(2):  # asking again gives the same, not twice scaled
        torch.testing.assert_close(inputs.batch(rows, views), expected)
        torch.testing.assert_close(inputs.batch(rows), plain)
