"""Iterative multi-label stratification over groups of rows.

After Sechidis, Tsoumakas & Vlahavas, "On the Stratification of Multi-Label Data" (ECML PKDD 2011).
Deviations: whole groups are dealt out instead of single examples (larger ones first, while there
is room); ties fall by the caller's order instead of chance; and at the end single groups are moved
so that a rare class is in every part, which the paper's algorithm does not promise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


def stratify(
    labels_GC: IntArray,
    balance_GK: IntArray,
    fractions: Sequence[float],
    minimum: Sequence[int],
) -> IntArray:
    """Deal groups out to parts such that each part gets its share of every label, [G].

    Args:
        labels_GC: how many rows of each group have each class' label.
        balance_GK: how many rows of each group are of each further kind to share out evenly; each
            row is of exactly one kind, so that a group's sum is its size.
        fractions: the share of each part P; they sum to 1.
        minimum: how many groups of each class each part is to have, if the class has as many in
            all; otherwise one, in as many parts as there are groups.

    The result depends on the order of the groups (which breaks ties) and on nothing else.
    """
    counts_GL = np.concatenate([labels_GC, balance_GK], axis=1)
    sizes_G = balance_GK.sum(axis=1)
    part_G = _deal(counts_GL, sizes_G, np.asarray(fractions, dtype=np.float64))
    _repair(part_G, labels_GC > 0, sizes_G, minimum)
    return part_G


def _deal(counts_GL: IntArray, sizes_G: IntArray, fractions_P: npt.NDArray[np.float64]) -> IntArray:
    """The paper's algorithm. The wish of a part is what it still lacks of its share."""
    part_G = np.full(len(sizes_G), -1, dtype=np.int64)
    wish_PL = np.outer(fractions_P, counts_GL.sum(axis=0))
    wish_P = fractions_P * sizes_G.sum()
    has_GL = counts_GL > 0
    # Stable: equal sizes stay in the caller's order.
    by_size = np.argsort(-sizes_G, kind="stable")
    while (left_L := has_GL[part_G < 0].sum(axis=0)).any():
        rarest = int(np.argmin(np.where(left_L > 0, left_L, len(sizes_G) + 1)))
        for group in by_size[(part_G[by_size] < 0) & has_GL[by_size, rarest]]:
            part = _most_wanting(wish_PL[:, rarest], wish_P)
            part_G[group] = part
            wish_PL[part] -= counts_GL[group]
            wish_P[part] -= sizes_G[group]
    return part_G


def _most_wanting(wish_P: npt.NDArray[np.float64], tie_break_P: npt.NDArray[np.float64]) -> int:
    """The part that lacks most; wishes are sums of rounded products, so near ties count as ties."""
    tied = np.flatnonzero(wish_P >= wish_P.max() - 1e-9)
    return int(tied[np.argmax(tie_break_P[tied])])


def _repair(part_G: IntArray, has_GC: BoolArray, sizes_G: IntArray, minimum: Sequence[int]) -> None:
    """Move single groups, in place, until each part has its minimum of each class, rarest first.

    A move never takes a class below its minimum in the part that gives, so that every move counts.
    """
    num_C = has_GC.sum(axis=0)
    need_PC = np.array([np.where(num_C >= sum(minimum), least, 1) for least in minimum])
    held_PC = np.array([has_GC[part_G == part].sum(axis=0) for part in range(len(minimum))])
    for rare in np.argsort(num_C, kind="stable"):
        for part in range(len(minimum)):
            while held_PC[part, rare] < need_PC[part, rare]:
                spare_PC = held_PC > need_PC
                spare_GC = spare_PC[part_G] | ~has_GC
                movable = has_GC[:, rare] & (part_G != part) & spare_GC.all(axis=1)
                if not movable.any():
                    break
                choices = np.flatnonzero(movable)
                # The smallest change: fewest rows, then fewest labels, then the caller's order.
                cost = list(
                    zip(sizes_G[choices], has_GC[choices].sum(axis=1), choices, strict=True)
                )
                group = int(min(cost)[2])
                held_PC[part_G[group]] -= has_GC[group]
                held_PC[part] += has_GC[group]
                part_G[group] = part
