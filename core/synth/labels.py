"""Which genres the drawn posters have: label sets as common, as rare and as mixed as real ones.

The numbers are totals over 6,156 films from 1980 to 2015 (labels of the set by W.-T. Chu and
H.-J. Guo, 2017): how many films have exactly this set of genres. Sets of few films are left out,
except for the rarest genres. Aggregates only: no film can be told from them.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from ..errors import InputError

GENRES = (
    "Action", "Adventure", "Animation", "Biography", "Comedy", "Crime", "Documentary", "Drama",
    "Family", "Fantasy", "History", "Horror", "Music", "Musical", "Mystery", "N/A", "News",
    "Reality-TV", "Romance", "Sci-Fi", "Short", "Sport", "Thriller", "War", "Western",
)  # fmt: skip
"""The 25 columns of the real CSV, in its order; "N/A" is a name like the others."""

MIN_IMAGES = 120
"""Fewer posters cannot give every genre enough positives and keep the common ones common."""

_LABEL_SET_COUNTS = """
394 Drama; 349 Comedy; 303 Comedy|Drama|Romance; 293 Comedy|Drama; 243 Documentary;
235 Comedy|Romance; 201 Drama|Romance; 152 Action|Crime|Drama; 95 Crime|Drama|Thriller;
94 Action|Comedy|Crime; 90 Drama|Thriller; 78 Adventure|Animation|Comedy;
72 Crime|Drama|Mystery; 71 Crime|Drama; 65 Action|Adventure|Comedy; 65 Action|Crime|Thriller;
63 Comedy|Crime|Drama; 62 Comedy|Crime; 58 Biography|Drama; 55 Action|Adventure|Sci-Fi;
50 Action|Adventure|Drama; 47 Horror|Thriller; 44 Biography|Drama|History; 44 Documentary|Music;
43 Action|Adventure|Fantasy; 42 Comedy|Drama|Music; 40 Comedy|Family; 40 Horror;
37 Action|Thriller; 36 Action|Drama; 36 Adventure|Comedy|Family; 36 Comedy|Drama|Family;
36 Drama|Mystery|Thriller; 35 Action|Drama|Thriller; 33 Action|Adventure|Thriller; 33 Drama|War;
32 Comedy|Family|Fantasy; 32 Drama|Music; 32 Drama|Sport; 31 Biography|Drama|Romance;
30 Adventure|Comedy|Drama; 30 Biography|Crime|Drama; 30 Comedy|Drama|Fantasy; 30 Thriller;
29 Adventure|Animation|Family; 28 Action|Comedy; 28 Comedy|Fantasy; 27 Biography|Documentary;
26 Biography|Drama|Music; 26 Drama|Music|Romance; 25 Crime|Drama|Romance;
24 Action|Adventure|Animation; 24 Comedy|Fantasy|Romance; 24 Crime|Thriller;
23 Animation|Comedy|Family; 23 Biography|Comedy|Drama; 23 Horror|Mystery|Thriller;
22 Action|Sci-Fi|Thriller; 22 Biography|Drama|Sport; 22 Comedy|Documentary; 21 Comedy|Horror;
21 Comedy|Sport; 20 Adventure|Family|Fantasy; 20 Comedy|Fantasy|Horror;
20 Drama|Mystery|Romance; 20 Drama|Romance|War; 19 Comedy|Music; 19 Crime|Mystery|Thriller;
17 Action; 17 Action|Horror|Sci-Fi; 17 Adventure|Comedy; 17 Comedy|Crime|Romance;
17 Documentary|Sport; 17 Horror|Mystery; 17 Horror|Sci-Fi|Thriller; 17 Mystery|Thriller;
16 Adventure|Drama; 16 Biography|Documentary|Music; 16 Comedy|Horror|Sci-Fi;
16 Comedy|Music|Romance; 15 Comedy|Crime|Mystery; 15 Comedy|Crime|Thriller; 15 Comedy|Sci-Fi;
15 Documentary|History; 15 Drama|History; 15 Drama|Romance|Thriller; 15 Fantasy|Horror;
15 Horror|Sci-Fi; 14 Action|Adventure|Family; 14 Action|Comedy|Romance; 14 Action|Drama|War;
14 Action|Sci-Fi; 14 Adventure|Drama|Family; 14 Biography|Documentary|History; 14 Drama|Family;
14 Drama|Horror|Thriller; 14 Drama|Musical|Romance; 14 Drama|Mystery; 13 Action|Adventure|Crime;
13 Action|Comedy|Drama; 13 Comedy|Drama|Musical; 13 Comedy|Family|Romance;
13 Drama|Horror|Mystery; 12 Action|Comedy|Sci-Fi; 12 Action|Crime|Sci-Fi;
12 Action|Drama|Sci-Fi; 12 Action|Drama|Sport; 12 Documentary|Drama; 12 Drama|Romance|Sport;
12 Fantasy|Horror|Thriller; 11 Action|Comedy|Fantasy; 11 Action|Crime|Mystery;
11 Action|Drama|Romance; 11 Comedy|Drama|Sport; 11 Drama|Fantasy; 11 Drama|Fantasy|Romance;
11 Drama|History|War; 10 Action|Fantasy|Horror; 10 Adventure|Biography|Drama;
10 Adventure|Comedy|Sci-Fi; 10 Comedy|Romance|Sport; 9 Action|Adventure;
9 Adventure|Comedy|Crime; 9 Adventure|Drama|Fantasy; 9 Adventure|Drama|Romance;
9 Adventure|Fantasy; 9 Comedy|Romance|Sci-Fi; 9 Drama|Fantasy|Horror; 9 Drama|History|Romance;
9 Drama|Horror|Sci-Fi; 9 Drama|Mystery|Sci-Fi; 9 Drama|Sci-Fi; 9 Drama|Short;
9 Horror|Mystery|Sci-Fi; 9 N/A; 8 Action|Biography|Drama; 8 Action|Horror|Thriller;
8 Action|Mystery|Sci-Fi; 8 Biography|Documentary|Drama; 8 Comedy|Horror|Thriller;
8 Comedy|Musical|Romance; 8 Documentary|War; 8 Drama|Family|Fantasy; 8 Drama|Fantasy|Mystery;
8 Drama|History|Thriller; 8 Sci-Fi|Thriller; 7 Action|Adventure|Horror; 7 Action|Drama|History;
7 Action|Mystery|Thriller; 7 Adventure|Comedy|Romance; 7 Adventure|Family;
7 Animation|Family|Fantasy; 7 Comedy|Crime|Family; 7 Documentary|History|News;
7 Documentary|History|War; 7 Drama|Romance|Sci-Fi; 7 Drama|Sci-Fi|Thriller;
7 Fantasy|Horror|Mystery; 6 Action|Adventure|Mystery; 6 Action|Drama|Fantasy;
6 Action|Drama|Mystery; 6 Adventure; 6 Adventure|Drama|Thriller; 6 Biography|Comedy|Documentary;
6 Biography|Drama|Thriller; 6 Comedy|Drama|Mystery; 6 Comedy|Family|Sport; 6 Comedy|Mystery;
6 Comedy|Thriller; 6 Crime|Documentary; 6 Crime|Documentary|Drama; 6 Crime|Drama|Fantasy;
6 Documentary|Short; 6 Drama|Western; 6 Music; 5 Biography|Documentary|Sport;
5 Biography|Drama|War; 5 Comedy|Musical; 5 Comedy|Western; 5 Drama|Music|Musical;
5 Drama|Musical; 5 Drama|Romance|Western; 5 Short; 5 Western; 4 Action|Thriller|War;
4 Comedy|War; 4 Drama|Family|Sport; 4 Drama|Thriller|War; 4 Musical|Romance;
3 Action|Adventure|Western; 3 Action|Sport; 3 Adventure|Comedy|Sport;
3 Adventure|Comedy|Western; 3 Adventure|Drama|Western; 3 Crime|Drama|Musical;
3 Documentary|Drama|News; 3 Documentary|News; 3 Musical; 2 Animation|Short;
2 Biography|Documentary|News; 2 Drama|History|Western; 2 Sci-Fi|Short; 1 Action|Adventure|Short;
1 Action|Comedy|Western; 1 Action|Drama|Western; 1 Action|Fantasy|Western;
1 Action|Sci-Fi|Short; 1 Action|Thriller|Western; 1 Action|Western;
1 Adventure|Documentary|News; 1 Adventure|Thriller|Western; 1 Adventure|Western;
1 Animation|Documentary|News; 1 Animation|Sci-Fi|Short; 1 Biography|Documentary|Short;
1 Biography|Drama|Western; 1 Comedy|Documentary|News; 1 Comedy|Drama|Short;
1 Comedy|Drama|Western; 1 Comedy|Sci-Fi|Western; 1 Comedy|Short; 1 Crime|Drama|Western;
1 Crime|Short; 1 Documentary|News|Sport; 1 Documentary|Short|War; 1 Drama|Family|Short;
1 Drama|Fantasy|Short; 1 Drama|Horror|Short; 1 Drama|Mystery|Short; 1 Drama|Romance|Short;
1 Fantasy|Horror|Short; 1 Fantasy|Mystery|Short; 1 News|Sci-Fi|Thriller; 1 Reality-TV;
1 Reality-TV|Short; 1 Romance|Western; 1 Short|Thriller; 1 Thriller|Western
"""


def min_positives(num_images: int) -> int:
    """Posters that every genre is given at least, so that each part of a split gets some: 12 from
    600 posters on, 6 for the smallest sets."""
    return min(12, max(6, num_images // 50))


def sample_label_sets(num_images: int, rng: np.random.Generator) -> list[tuple[str, ...]]:
    """Genres of `num_images` posters, each a tuple of 1 to 3 names in the order of `GENRES`.

    Drawn by their real frequency; then posters of common genres give way until every genre has
    `min_positives`. Raises InputError below `MIN_IMAGES`.
    """
    if num_images < MIN_IMAGES:
        raise InputError(
            f"num_images >= {MIN_IMAGES} must hold, but got {num_images}",
            where="num_images",
            hint=f"every one of {len(GENRES)} genres needs posters in each part of a split",
        )
    label_sets, share = _label_sets()
    rows = [label_sets[i] for i in rng.choice(len(label_sets), size=num_images, p=share)]
    wanted = min_positives(num_images)
    for genre in sorted(GENRES, key=lambda genre: _frequency()[genre]):
        holders = [i for i, labels in enumerate(label_sets) if genre in labels]
        holder_share = share[holders] / share[holders].sum()
        while _count(rows, genre) < wanted:
            # A set drawn again and again would be a class of its own: soften the frequencies.
            chosen = rng.choice(holders, p=_soften(holder_share))
            rows[_expendable_row(rows, wanted, rng)] = label_sets[chosen]
    return rows


def genre_share() -> npt.NDArray[np.float64]:
    """Share of each genre among all labels, in the order of `GENRES`; sums to one."""
    counts = np.array([_frequency()[genre] for genre in GENRES], dtype=np.float64)
    share: npt.NDArray[np.float64] = counts / counts.sum()
    return share


@functools.cache
def _label_sets() -> tuple[list[tuple[str, ...]], npt.NDArray[np.float64]]:
    """The label sets of the table and the share of each."""
    entries = [e.strip().split(" ", 1) for e in _LABEL_SET_COUNTS.replace("\n", " ").split(";")]
    counts = np.array([int(count) for count, _ in entries], dtype=np.float64)
    return [tuple(names.split("|")) for _, names in entries], counts / counts.sum()


@functools.cache
def _frequency() -> dict[str, float]:
    label_sets, share = _label_sets()
    return {
        genre: float(sum(s for labels, s in zip(label_sets, share, strict=True) if genre in labels))
        for genre in GENRES
    }


def _count(rows: list[tuple[str, ...]], genre: str) -> int:
    return sum(genre in labels for labels in rows)


def _soften(
    share: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    root = np.sqrt(share)
    softened: npt.NDArray[np.float64] = root / root.sum()
    return softened


def _expendable_row(rows: list[tuple[str, ...]], wanted: int, rng: np.random.Generator) -> int:
    """A row all of whose genres have more positives than wanted, so that none falls short."""
    spare = {genre for genre in GENRES if _count(rows, genre) > wanted}
    candidates = [i for i, labels in enumerate(rows) if spare.issuperset(labels)]
    assert candidates, "MIN_IMAGES leaves posters of common genres to replace"
    return int(rng.choice(candidates))
