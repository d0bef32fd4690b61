"""Scaled features that a process keeps from one cohort to the next.

To scale them takes as long as some epochs of few heads, and cohort after cohort reads the same
files. What a cohort does not read is forgotten before it begins, so that no more is in memory than
it needs. Features that are no file may change meanwhile: they are scaled anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..encoding.inputs import HeadInputs, Rows
from .helper_pool import MatrixFile, by_name

if TYPE_CHECKING:
    from .group import Source


@dataclass(frozen=True)
class _Files:
    """What a source reads: two that are equal hold the same numbers."""

    plain: MatrixFile
    views: tuple[tuple[str, MatrixFile], ...]

    @staticmethod
    def of(source: Source) -> _Files | None:
        """None if a part of it is no file."""
        plain = by_name(source.features)
        views = {name: by_name(matrix) for name, matrix in source.further_views.items()}
        files = {name: file for name, file in views.items() if isinstance(file, MatrixFile)}
        if not isinstance(plain, MatrixFile) or len(files) < len(views):
            return None
        return _Files(plain, tuple(files.items()))


class CohortInputs:
    """`HeadInputs` of one cohort, by the place of the source.

    Args:
        sources: that the cohort reads.
        device: where batches are wanted.
        earlier: of a cohort before, whose scaled features are taken over where they are the same.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        device: torch.device | str,
        earlier: CohortInputs | None = None,
    ) -> None:
        self._sources = sources
        self._device = torch.device(device)
        files = [_Files.of(source) for source in sources]
        self._names: list[_Files | int] = [
            place if name is None else name for place, name in enumerate(files)
        ]
        self._inputs: dict[tuple[_Files | int, str, bytes], HeadInputs] = {}
        if earlier is not None and earlier._device == self._device:
            self._inputs = {
                key: inputs
                for key, inputs in list(earlier._inputs.items())
                if isinstance(key[0], _Files) and key[0] in files
            }

    def of(self, place: int, *, norm: str, train_rows: Rows) -> HeadInputs:
        """Those of the source at this place, scaled as `HeadInputs` does."""
        key = (self._names[place], norm, train_rows.tobytes())
        if key not in self._inputs:
            source = self._sources[place]
            self._inputs[key] = HeadInputs(
                source.features,
                norm=norm,
                train_rows=train_rows,
                device=self._device,
                further_views=list(source.further_views.values()),
            )
        return self._inputs[key]


class KeptInputs:
    """What a process remembers between cohorts."""

    def __init__(self) -> None:
        self._latest: CohortInputs | None = None

    def of_cohort(self, sources: Sequence[Source], device: torch.device | str) -> CohortInputs:
        """The inputs of a cohort that begins."""
        self._latest = CohortInputs(sources, device, self._latest)
        return self._latest
