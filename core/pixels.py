"""Decoded pictures on disk: uint8 squares of one size, so that nothing is decoded twice.

A second backbone of the same input size, and every epoch of fine-tuning, read them from here.
Kept like features, in shards under a key of picture contents, size and resizing (`core.shards`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .pictures import decode_square, default_threads, open_picture
from .shards import ShardedMatrix, content_key

Pictures = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class PixelSpec:
    """What a matrix of decoded pictures is; the hash of this is its name in the cache."""

    pictures: str
    """Fingerprint of the picture contents, in the order of rows."""
    input_size: int
    """Side of the squares in pixels."""
    resize: str
    """How pictures were made square: see `core.pictures.decode_square`."""

    @property
    def key(self) -> str:
        return content_key(asdict(self))


class PixelStore:
    """All pictures of a table as squares; decodes what is asked for and not there yet.

    Args:
        cache: root of the cache.
        spec: what the squares are.
        paths: one a row.
    """

    def __init__(self, cache: Path, spec: PixelSpec, paths: Sequence[Path]) -> None:
        self.spec = spec
        self._paths = paths
        self.matrix = ShardedMatrix(
            cache / "pixels" / spec.key,
            spec=asdict(spec),
            num_rows=len(paths),
            row_shape=(spec.input_size, spec.input_size, 3),
            dtype="uint8",
        )

    def shard(self, shard: int) -> Pictures:
        """The pictures of one shard, decoded and kept if they were not yet.

        Raises InputError for a picture that cannot be read.
        """
        rows = self.matrix.shard_rows(shard)
        if self.matrix.has(shard):
            # Copied: the disk is read here, in the thread that reads ahead, and torch asks for
            # memory that can be written.
            return np.array(self.matrix.open()[rows])
        pixels = decode_pictures(
            self._paths[rows], size=self.spec.input_size, resize=self.spec.resize
        )
        self.matrix.write_shard(shard, pixels)
        return pixels

    def fill(self, shards: Sequence[int], progress: Progress | None = None) -> None:
        """Decode these shards; progress is (pictures done, pictures to do)."""
        sizes = [self.matrix.shard_rows(s).stop - self.matrix.shard_rows(s).start for s in shards]
        for place, shard in enumerate(shards):
            self.shard(shard)
            if progress is not None:
                progress(sum(sizes[: place + 1]), sum(sizes))


def decode_pictures(paths: Sequence[Path], *, size: int, resize: str) -> Pictures:
    """Pictures as uint8 squares [n, size, size, 3], decoded in threads.

    Raises InputError for one that cannot be read.
    """

    def decode(path: Path) -> Pictures:
        return decode_square(open_picture(path), size, resize=resize)

    with ThreadPoolExecutor(default_threads()) as threads:
        return np.stack(list(threads.map(decode, paths)))
