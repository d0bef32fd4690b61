"""Tables and pictures handed in wrong, through the real command: exit code 2,
a message that says where it is, what is wrong and what would be right, no traceback, and nothing
written."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Run = Callable[..., Any]


def edit_csv(data: Path, change: Callable[[list[list[str]]], None]) -> None:
    path = data / "train.csv"
    cells = [line.split(",") for line in path.read_text().splitlines()]
    change(cells)
    path.write_text("\n".join(",".join(line) for line in cells) + "\n")


def set_cell(row: int, column: int, text: str) -> Callable[[Path], None]:
    """Row as a spreadsheet counts: the header is 1."""

    def change(cells: list[list[str]]) -> None:
        cells[row - 1][column] = text

    return lambda data: edit_csv(data, change)


def clear_class(column: int, rows: range) -> Callable[[Path], None]:
    def change(cells: list[list[str]]) -> None:
        for row in rows:
            cells[row - 1][column] = "0"

    return lambda data: edit_csv(data, change)


def give_split(data: Path) -> None:
    """Rows 2 to 9 are the test part, and none of them shows War."""

    def change(cells: list[list[str]]) -> None:
        for row, line in enumerate(cells, 1):
            is_test = 2 <= row <= 9
            line.append("split" if row == 1 else "test" if is_test else "train")
            if is_test:
                line[4] = "0"

    edit_csv(data, change)


def lead_out_by_link(data: Path) -> None:
    (data.parent / "secret.png").write_bytes((data / "3.png").read_bytes())
    (data / "3.png").unlink()
    (data / "3.png").symlink_to(data.parent / "secret.png")


def keep_columns(number: int) -> Callable[[Path], None]:
    def change(cells: list[list[str]]) -> None:
        cells[:] = [line[:number] for line in cells]

    return lambda data: edit_csv(data, change)


def nothing(data: Path) -> None:
    """The table is as it should be: a flag is wrong."""


TABLES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...], tuple[str, ...]]] = {
    "no CSV": (
        lambda data: (data / "train.csv").unlink(),
        (),
        ("posters: no CSV file", "name it with --csv"),
    ),
    "no such CSV": (nothing, ("--csv", "films.csv"), ("films.csv: there is no such CSV file",)),
    "empty CSV": (lambda data: (data / "train.csv").write_text(""), (), ("train.csv", "empty")),
    "only a header": (
        lambda data: (data / "train.csv").write_text("Id,Action,Drama\n"),
        (),
        ("train.csv", "holds no rows"),
    ),
    "not UTF-8": (
        lambda data: (data / "train.csv").write_bytes("Id,Dramé\n1,0\n".encode("latin-1")),
        (),
        ("train.csv", "not UTF-8", "save it as CSV UTF-8"),
    ),
    "id column": (
        nothing,
        ("--id-column", "imdb"),
        ("train.csv", "no column 'imdb'", "columns: Id, Action, Drama, N/A, War"),
    ),
    "label column": (nothing, ("--label-column", "g"), ("no column 'g'", "columns: Id, Action")),
    "split column": (nothing, ("--split-column", "s"), ("no column 's'", "columns: Id, Action")),
    "no labels": (keep_columns(1), (), ("train.csv", "no column holds labels", "--label-column")),
    "not 0/1": (
        set_cell(5, 2, "2"),
        (),
        ("train.csv, column 'Drama'", "row 5 holds '2'", "neither 0 nor 1", "0 or 1 in every row"),
    ),
    "ids with different labels": (
        set_cell(5, 0, "0"),
        (),
        ("train.csv", "repeated with different labels: 0 (rows 2, 5)", "keep one row of each"),
    ),
    "fewer rows than classes": (
        lambda data: edit_csv(data, lambda cells: cells.__delitem__(slice(4, None))),
        (),
        ("train.csv", "3 rows are fewer than the 4 classes"),
    ),
    "fewer than 4 classes": (
        keep_columns(4),
        (),
        ("posters", "3 classes are too few for top3_accuracy", "it takes 4 classes"),
    ),
    "leaves the folder": (
        set_cell(3, 0, "../secret.png"),
        (),
        ("train.csv", "row 3 holds '../secret.png', which leaves the folder", "--images"),
    ),
    "leaves the folder by a link": (
        lead_out_by_link,
        (),
        ("train.csv", "row 5 holds '3', which leaves the folder"),
    ),
    "class without picture": (
        clear_class(4, range(2, 26)),
        (),
        ("posters", "cannot be split: War (0)", "add pictures of them, or take these classes out"),
    ),
    "class missing in a given split": (
        give_split,
        (),
        ("posters", "class 'War' has no picture in test", "move one there"),
    ),
    "no picture folder": (nothing, ("--images", "covers"), ("covers", "no such folder")),
}


@pytest.mark.parametrize("case", TABLES)
def test_table(case: str, refused: Run, data: Path, space: Path) -> None:
    arrange, flags, says = TABLES[case]
    arrange(data)
    refused("search", space, "--data", data, *flags, says=says)


def test_no_data_folder(refused: Run, tmp_path: Path, space: Path) -> None:
    refused("search", space, "--data", tmp_path / "nowhere", says=("nowhere", "no such folder"))
    refused("data", "check", "--data", tmp_path / "nowhere", says=("nowhere", "no such folder"))
    refused("search", space, says=("Missing option '--data'",))


def claim_size(width: int, height: int) -> bytes:
    """A PNG that is larger than memory by its header, and 100 bytes on disk."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: path.unlink(), "the picture is missing"),
    "empty": (lambda path: path.write_bytes(b""), "the file is empty"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:200]), "damaged"),
    "not an image": (lambda path: path.write_text("<html>404</html>"), "this is not a picture"),
    "bomb": (
        lambda path: path.write_bytes(claim_size(60_000, 60_000)),
        "60000 x 60000 pixels are more than the limit of 50,000,000",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_picture_is_refused_or_skipped(
    case: str, refused: Run, tuner: Run, data: Path, space: Path
) -> None:
    damage, reason = DAMAGE[case]
    damage(data / "7.png")
    says = ("posters: 1 of 24 pictures cannot be used", f"{data}/7.", reason, "--skip-bad-images")
    refused("search", space, "--data", data, says=says)
    refused("data", "check", "--data", data, says=says)
    ended = tuner("data", "check", "--data", data, "--skip-bad-images", "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert report["num_images"] == 23
    assert [Path(entry["path"]).stem for entry in report["left_out"]] == ["7"]
    assert reason in report["left_out"][0]["reason"]


def test_skipped_pictures_are_counted_and_listed(tuner: Run, data: Path, space: Path) -> None:
    bad = [3, 8, 20]
    for number in bad:
        (data / f"{number}.png").write_text("damaged")
    ended = tuner("search", space, "--data", data, "--skip-bad-images", "--dry-run")
    assert ended.code == 0, ended.err
    flat = ended.out.replace("\n", "")
    assert "3 damaged pictures are left out" in flat
    for number in range(24):
        assert (f"posters/{number}.png: this is not a picture" in flat) == (number in bad)
    assert "21 pictures, 4 classes" in flat


def test_many_damaged_pictures_are_summed_up(refused: Run, data: Path, space: Path) -> None:
    for number in range(22):
        (data / f"{number}.png").write_text("damaged")
    refused(
        "search", space, "--data", data, says=("22 of 24 pictures cannot be used", "and 17 more")
    )
    refused(
        "search", space, "--data", data, "--skip-bad-images",
        says=("2 usable pictures are left for 4 classes", "at least as many pictures as classes"),
    )  # fmt: skip


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def test_unusual_pictures_are_welcome(tuner: Run, data: Path) -> None:
    """CMYK, palette, transparent, 16-bit and animated pictures are read, not refused."""
    noise = Image.fromarray(np.random.default_rng(99).integers(0, 256, (24, 16, 3), dtype=np.uint8))
    deep = Image.fromarray(np.random.default_rng(98).integers(0, 65536, (24, 16), dtype=np.uint16))
    frames = [noise.rotate(90).convert("P"), noise.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    kinds = {
        "0.jpg": encoded(noise.convert("CMYK"), "JPEG"),
        "1.png": encoded(noise.rotate(180).convert("P"), "PNG"),
        "2.png": encoded(noise.transpose(Image.Transpose.FLIP_TOP_BOTTOM).convert("RGBA"), "PNG"),
        "3.png": encoded(deep, "PNG"),
        "4.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    }
    for name, content in kinds.items():
        (data / name).with_suffix(".png").unlink()
        (data / name).write_bytes(content)
    ended = tuner("data", "check", "--data", data, "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["num_images"] == 24
    assert json.loads(ended.out)["left_out"] == []
