"""Which rows show the same picture, so that a split can keep them on one side.

Rows belong together when their ids are equal, their files are equal, or their pictures nearly so:
a difference hash (N. Krawetz, "Kind of Like That", 2013), here of 512 bits, proposes pairs and the
correlation of grey thumbnails confirms them, as hashes of mostly dark posters meet by accident.
The thresholds were set by eye on 6,156 film posters: they join re-encoded, resized, brightened and
slightly cropped copies, one poster in two tints and a shop's placeholder, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..images.pictures import default_threads, open_picture
from .table import Table

IntArray = npt.NDArray[np.int64]

HASH_BITS = 512
RULES = ((64, 0.8), (90, 0.88))
"""A pair is a near duplicate if for any of these it differs in at most so many bits and its
thumbnails correlate at least so much. The nearest different posters: 96 bits with 0.85 and 107
bits with 0.90."""

_SIDE = 17
_FLAT = 2.0
"""Thumbnails that vary less than this (standard deviation, grey levels) are never near duplicates:
one blank picture is like any other. Equal files still are."""
_BLOCK = 256


def find_groups(
    table: Table,
    *,
    num_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> IntArray:
    """The group of each row, [N]: groups are numbered from 0 in order of their first row.

    Groups are the connected components of "equal id, equal file or near-duplicate picture".
    Decodes every picture; the comparison takes N^2 / 2 steps (0.5 s for 6,000, 2 min for 100,000).

    Args:
        table: the pictures must be readable (see `core.images.pictures.check_pictures`).
        num_threads: None for one a core, at most 8.
        progress: called with (done, total) after each picture.

    Raises:
        InputError: a picture cannot be decoded.
    """
    pairs = near_duplicate_pairs(table.paths, num_threads=num_threads, progress=progress)
    return join_rows([table.ids, table.content_hashes], pairs)


def join_rows(
    keys: Sequence[Sequence[Hashable]], pairs: Iterable[tuple[int, int]] = ()
) -> IntArray:
    """Number the connected components of "equal in any of `keys`, or one of `pairs`", [N].

    Args:
        keys: at least one sequence, each with one entry a row.
        pairs: further rows that belong together.
    """
    parents = list(range(len(keys[0])))
    neighbours = [pair for one in keys for pair in _equal_neighbours(one)]
    for first, second in (*neighbours, *pairs):
        parents[_find(parents, second)] = _find(parents, first)
    numbers: dict[int, int] = {}
    components = (_find(parents, row) for row in range(len(parents)))
    return np.array([numbers.setdefault(c, len(numbers)) for c in components], dtype=np.int64)


def near_duplicate_pairs(
    paths: Sequence[Path],
    *,
    num_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[int, int]]:
    """The pairs (i, j), i < j, of places in `paths` with nearly equal pictures."""
    if not paths:
        return []
    thumbnails = []
    with ThreadPoolExecutor(num_threads or default_threads()) as pool:
        for thumbnail in pool.map(_thumbnail, paths):
            thumbnails.append(thumbnail)
            if progress is not None:
                progress(len(thumbnails), len(paths))
    return _compare(np.stack(thumbnails))


def _thumbnail(path: Path) -> npt.NDArray[np.uint8]:
    """The picture in grey, [17, 17]."""
    grey = open_picture(path).convert("L")
    return np.array(grey.resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.uint8)


def _compare(thumbnails_Nhw: npt.NDArray[np.uint8]) -> list[tuple[int, int]]:
    hashes_NW = _difference_hashes(thumbnails_Nhw)
    num_images = len(hashes_NW)
    vectors_ND = thumbnails_Nhw.reshape(num_images, -1).astype(np.float64)
    flat_N = vectors_ND.std(axis=1) < _FLAT
    vectors_ND -= vectors_ND.mean(axis=1, keepdims=True)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True) + 1e-12
    loosest = max(bits for bits, _ in RULES)
    pairs = []
    for start in range(0, num_images, _BLOCK):
        block = hashes_NW[start : start + _BLOCK]
        # Only later rows, so that each pair is met once.
        distances = np.zeros((len(block), num_images - start), dtype=np.uint16)
        for word in range(hashes_NW.shape[1]):
            distances += np.bitwise_count(block[:, word, None] ^ hashes_NW[None, start:, word])
        for i, j in np.argwhere(distances <= loosest):
            first, second = start + int(i), start + int(j)
            if first >= second or flat_N[first] or flat_N[second]:
                continue
            correlation = float(vectors_ND[first] @ vectors_ND[second])
            if any(distances[i, j] <= bits and correlation >= least for bits, least in RULES):
                pairs.append((first, second))
    return pairs


def _difference_hashes(thumbnails_Nhw: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """One bit for each step to the right and each step down that gets brighter, [N, 8] words."""
    right = thumbnails_Nhw[:, :-1, 1:] > thumbnails_Nhw[:, :-1, :-1]
    down = thumbnails_Nhw[:, 1:, :-1] > thumbnails_Nhw[:, :-1, :-1]
    bits = np.stack([right, down], axis=1).reshape(len(thumbnails_Nhw), HASH_BITS)
    return np.packbits(bits, axis=1).view(np.uint64)


def _equal_neighbours(keys: Sequence[Hashable]) -> Iterable[tuple[int, int]]:
    """Each place with the first place that holds an equal key, if that is another one."""
    first: dict[Hashable, int] = {}
    for place, key in enumerate(keys):
        before = first.setdefault(key, place)
        if before != place:
            yield before, place


def _find(parents: list[int], row: int) -> int:
    """The representative of a row's component (union-find with path halving)."""
    while parents[row] != row:
        parents[row] = parents[parents[row]]
        row = parents[row]
    return row
