"""Near-duplicate pictures: what joins, what does not, and that groups are connected components."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from core.data.duplicates import HASH_BITS, find_groups, join_rows, near_duplicate_pairs
from core.data.table import Table, read_table
from core.errors import InputError


def _scene(seed: int) -> Image.Image:
    """A smooth colour picture with structure at all scales, unlike any of another seed."""
    rng = np.random.default_rng(seed)
    layers = [
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize(
            (120, 180), Image.Resampling.BICUBIC
        )
        for side in (3, 6, 12)
    ]
    return Image.blend(Image.blend(layers[0], layers[1], 0.4), layers[2], 0.3)


def _jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def _trim(image: Image.Image, share: float) -> Image.Image:
    width, height = image.size
    box = (width * share, height * share, width * (1 - share), height * (1 - share))
    return image.crop(tuple(round(side) for side in box))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "recompressed": lambda image: _jpeg(image, 25),
    "halved": lambda image: image.resize((60, 90)),
    "doubled": lambda image: image.resize((240, 360)),
    "stretched": lambda image: image.resize((150, 180)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "grey": lambda image: image.convert("L"),
    "trimmed": lambda image: _trim(image, 0.01),
}


def _save(folder: Path, images: dict[str, Image.Image]) -> list[Path]:
    paths = []
    for name, image in images.items():
        paths.append(folder / f"{name}.png")
        image.save(paths[-1])
    return paths


def _table(folder: Path, ids: list[str], paths: list[Path]) -> Table:
    targets_NC = np.ones((len(ids), 1), dtype=np.uint8)
    return Table(
        name=folder.name,
        root=folder,
        ids=tuple(ids),
        paths=tuple(paths),
        targets_NC=targets_NC,
        class_names=("A",),
    )


@pytest.mark.parametrize("change", COPIES)
def test_copies_are_found_among_other_pictures(change: str, tmp_path: Path) -> None:
    images = {f"{seed}": _scene(seed) for seed in range(12)}
    images |= {f"{seed}_copy": COPIES[change](_scene(seed)) for seed in (2, 7, 11)}
    pairs = near_duplicate_pairs(_save(tmp_path, images))
    assert sorted(pairs) == [(2, 12), (7, 13), (11, 14)]


def test_other_pictures_are_not_joined(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = {f"scene{seed}": _scene(seed) for seed in range(40)}
    images |= {f"mirror{s}": _scene(s).transpose(Image.Transpose.ROTATE_180) for s in range(10)}
    for n in range(20):  # Mostly black with one bright spot: their hashes differ in few bits.
        dark = Image.new("RGB", (60, 90))
        left, top = rng.integers(0, 50), rng.integers(0, 80)
        dark.paste("white", (int(left), int(top), int(left) + 9, int(top) + 9))
        images[f"dark{n}"] = dark
    pairs = near_duplicate_pairs(_save(tmp_path, images))
    names = list(images)
    assert [(names[i], names[j]) for i, j in pairs if "dark" not in names[i]] == []
    # Spots that all but cover each other may be joined, and only those.
    assert len(pairs) <= 5


def test_blank_pictures_are_joined_by_equal_files_only(tmp_path: Path) -> None:
    images = {name: Image.new("RGB", (20, 30), name) for name in ("red", "blue", "white")}
    images["red_again"] = images["red"]
    paths = _save(tmp_path, images)
    assert near_duplicate_pairs(paths) == []
    groups = find_groups(_table(tmp_path, list(images), paths))
    assert groups.tolist() == [0, 1, 2, 0]


def test_the_blocks_of_the_comparison_miss_no_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = {f"{n}": _scene(n % 7) for n in range(20)}
    paths = _save(tmp_path, images)
    expected = [(i, j) for i in range(20) for j in range(i + 1, 20) if i % 7 == j % 7]
    for block in (1, 3, 64):
        monkeypatch.setattr("core.data.duplicates._BLOCK", block)
        assert sorted(near_duplicate_pairs(paths)) == expected


def test_groups_join_equal_ids_equal_files_and_near_duplicates(tmp_path: Path) -> None:
    images = {f"{seed}": _scene(seed) for seed in range(4)}
    images["near_0"] = COPIES["recompressed"](_scene(0))
    paths = _save(tmp_path, images)
    # Row 5 has the id of row 1 and the file of row 3: 1 and 3 are joined through it.
    table = _table(tmp_path, ["a", "b", "c", "d", "e", "b"], [*paths, paths[3]])
    groups = find_groups(table)
    assert groups.dtype == np.int64
    assert groups.tolist() == [0, 1, 2, 1, 0, 1]


def test_progress_and_nothing_to_compare(tmp_path: Path) -> None:
    paths = _save(tmp_path, {"a": _scene(0), "b": _scene(1)})
    seen: list[tuple[int, int]] = []
    near_duplicate_pairs(paths, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert near_duplicate_pairs([]) == []


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"broken\.png: this is not a picture"):
        near_duplicate_pairs([path])


def test_join_rows_equals_a_plain_search_of_the_graph() -> None:
    rng = np.random.default_rng(1)
    for _ in range(30):
        first, second = rng.integers(0, 25, (2, 30)).tolist()
        pairs = [(int(i), int(j)) for i, j in rng.integers(0, 30, (3, 2)) if i != j]
        groups = join_rows([first, second], pairs)
        for start in range(30):
            reached, todo = {start}, [start]
            while todo:
                at = todo.pop()
                for other in range(30):
                    linked = first[at] == first[other] or second[at] == second[other]
                    linked |= (at, other) in pairs or (other, at) in pairs
                    if linked and other not in reached:
                        reached.add(other)
                        todo.append(other)
            assert reached == set(np.flatnonzero(groups == groups[start]).tolist())
        # Numbered in order of the first row of each.
        _, first_rows = np.unique(groups, return_index=True)
        assert (np.diff(first_rows) > 0).all()


def test_the_hash_has_as_many_bits_as_it_says() -> None:
    from core.data.duplicates import _difference_hashes

    checks = np.indices((17, 17)).sum(axis=0) % 2 * np.uint8(255)
    both = np.stack([checks, np.zeros_like(checks)]).astype(np.uint8)
    hashes_NW = _difference_hashes(both)
    assert hashes_NW.shape == (2, HASH_BITS // 64)
    # On a chessboard half the steps get brighter, on a blank none.
    assert np.bitwise_count(hashes_NW).sum(axis=1).tolist() == [HASH_BITS // 2, 0]


@pytest.mark.posters
def test_real_posters_are_joined_as_a_person_would(posters_dir: Path) -> None:
    table = read_table(posters_dir)
    groups = find_groups(table)
    sizes = np.bincount(groups)
    joined = [
        tuple(table.ids[row] for row in np.flatnonzero(groups == group))
        for group in np.flatnonzero(sizes > 1)
    ]
    # Looked at side by side: a shop's placeholder with two titles, one poster under two ids, and
    # one poster in two tints.
    assert joined == [
        ("tt0093658", "tt0100100"),
        ("tt0402577", "tt0420286"),
        ("tt2546294", "tt2546300"),
    ]
