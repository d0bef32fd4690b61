"""Decoded pictures on disk: uint8 squares of one size, so that nothing is decoded twice.

A second backbone of the same input size, and every epoch of fine-tuning, read them from here.
Kept like features, in shards under a key of picture contents, size and resizing
(`core.encoding.shards`). One store a size, as squares that are scaled again would be other pictures
than those that a saved model sees. Sizes that are known together are cut from one decoding; one
that comes later decodes again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..encoding.shards import ShardedMatrix, content_key
from .pictures import DECODING, decode_square, default_threads, open_picture

Pictures = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]
PART_ROWS = 8
"""Pictures that a thread decodes at a time where nothing else is done to them."""
Square = tuple[int, str]
"""Side and resizing: see `core.images.pictures.decode_square`."""


@dataclass(frozen=True, kw_only=True)
class PixelSpec:
    """What a matrix of decoded pictures is; the hash of this is its name in the cache."""

    pictures: str
    """Fingerprint of the picture contents, in the order of rows."""
    input_size: int
    """Side of the squares in pixels."""
    resize: str
    """How pictures were made square: see `core.images.pictures.decode_square`."""
    decoding: int = DECODING
    """See `core.images.pictures.DECODING`."""

    @property
    def key(self) -> str:
        return content_key(asdict(self))

    @property
    def square(self) -> Square:
        return self.input_size, self.resize


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """The pictures of one shard, found or still to be decoded."""

    read: Callable[[slice], Pictures]
    """Some rows of the shard, decoded in the calling thread where that is needed; several threads
    may read different rows. Raises InputError for a picture that cannot be read."""
    keep: Callable[[], None]
    """Once every row was read: writes them to the stores that lacked them; nothing to do for
    pictures that were found."""


class PixelStore:
    """All pictures of a table as squares; decodes what is asked for and not there yet.

    Args:
        cache: root of the cache.
        spec: what the squares are.
        paths: one a row.
        num_threads: that decode; None for one a core, at most 8.
    """

    def __init__(
        self,
        cache: Path,
        spec: PixelSpec,
        paths: Sequence[Path],
        *,
        num_threads: int | None = None,
    ) -> None:
        self.spec = spec
        self._paths = paths
        self._num_threads = num_threads
        self.matrix = ShardedMatrix(
            cache / "pixels" / spec.key,
            spec=asdict(spec),
            num_rows=len(paths),
            row_shape=(spec.input_size, spec.input_size, 3),
            dtype="uint8",
        )

    def fetch(self, shard: int, others: Sequence[PixelStore] = ()) -> Fetched:
        """The pictures of one shard, to be decoded if they were not yet, or were damaged.

        `others`: stores of further sizes over the same paths. Those that lack the shard, too, get
        their squares from the same decoding.
        """
        found: Pictures | None = self.matrix.read_shard(shard)
        if found is not None:
            return Fetched(read=found.__getitem__, keep=lambda: None)
        stores = [self, *(store for store in others if not store.matrix.has(shard))]
        paths = self._paths[self.matrix.shard_rows(shard)]
        squares = [
            np.empty((len(paths), size, size, 3), np.uint8)
            for size, _ in (store.spec.square for store in stores)
        ]

        def read(rows: slice) -> Pictures:
            parts = [pixels[rows] for pixels in squares]
            decode_pictures(paths[rows], [store.spec.square for store in stores], parts)
            return parts[0]

        def keep() -> None:
            for store, pixels in zip(stores, squares, strict=True):
                store.matrix.write_shard(shard, pixels)

        return Fetched(read=read, keep=keep)

    def fill(
        self,
        shards: Sequence[int],
        progress: Progress | None = None,
        others_of: Callable[[int], Sequence[PixelStore]] = lambda shard: (),
    ) -> None:
        """Decode these shards, in threads; progress is (pictures done, pictures to do).
        `others_of`: shard -> `others` of `fetch`. Raises InputError for a picture that cannot be
        read."""
        sizes = [self.matrix.shard_rows(s).stop - self.matrix.shard_rows(s).start for s in shards]
        with ThreadPoolExecutor(self._num_threads or default_threads()) as threads:
            for place, shard in enumerate(shards):
                fetched = self.fetch(shard, others_of(shard))
                parts = [slice(row, row + PART_ROWS) for row in range(0, sizes[place], PART_ROWS)]
                for _ in threads.map(fetched.read, parts):
                    pass  # Asked for, so that the first mistake is raised here.
                fetched.keep()
                if progress is not None:
                    progress(sum(sizes[: place + 1]), sum(sizes))


def decode_pictures(
    paths: Sequence[Path], squares: Sequence[Square], out: Sequence[Pictures]
) -> None:
    """Write pictures as uint8 squares into arrays [n, size, size, 3], one for each of `squares`.
    Each picture is decoded once, in the calling thread.

    Raises InputError for one that cannot be read.
    """
    for row, path in enumerate(paths):
        picture = open_picture(path)
        for (size, resize), pixels in zip(squares, out, strict=True):
            pixels[row] = decode_square(picture, size, resize=resize)
