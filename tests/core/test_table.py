"""Tables: every layout that is understood, and a clear word on everything that is not."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from core.data.table import Table, read_table
from core.data.table_report import describe
from core.errors import InputError
from core.images.pictures import check_pictures

POSTER_GENRES = (
    "Action",
    "Adventure",
    "Animation",
    "Biography",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Family",
    "Fantasy",
    "History",
    "Horror",
    "Music",
    "Musical",
    "Mystery",
    "N/A",
    "News",
    "Reality-TV",
    "Romance",
    "Sci-Fi",
    "Short",
    "Sport",
    "Thriller",
    "War",
    "Western",
)


def _folder(root: Path, csv: str, pictures: str = "a b c", images: str = "Images") -> Path:
    """A data folder: its CSV and pictures `NAME.jpg` (or NAME as it is, if it has an ending)."""
    (root / images).mkdir(parents=True, exist_ok=True)
    for n, name in enumerate(pictures.split()):
        path = root / images / (name if "." in name else f"{name}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 12), (40 * n, 10, 200)).save(path)
    (root / "train.csv").write_text(csv, encoding="utf-8")
    return root


def _posters_csv(rows: dict[str, list[str]]) -> str:
    lines = [",".join(["Id", "Genre", *POSTER_GENRES])]
    for name, genres in rows.items():
        flags = [str(int(genre in genres)) for genre in POSTER_GENRES]
        lines.append(",".join([name, f'"{genres}"', *flags]))
    return "\n".join(lines) + "\n"


def test_the_layout_of_the_posters(tmp_path: Path) -> None:
    names = [f"tt{n:07}" for n in range(26)]
    genres = [[POSTER_GENRES[n % 25], "Drama"] for n in range(26)]
    csv = _posters_csv(dict(zip(names, genres, strict=True)))
    folder = _folder(tmp_path / "films", csv, " ".join(names))
    table = read_table(folder)
    assert table.name == "films"
    assert table.root == folder
    assert (table.num_images, table.num_classes) == (26, 25)
    assert table.class_names == tuple(POSTER_GENRES)
    assert table.ids == tuple(names)
    assert table.paths == tuple(folder / "Images" / f"{name}.jpg" for name in names)
    assert table.targets_NC.dtype == np.uint8
    for row, expected in enumerate(genres):
        held = {POSTER_GENRES[c] for c in np.flatnonzero(table.targets_NC[row])}
        assert held == set(expected)
    assert table.given_split is None
    assert table.ignored_columns == ()


@pytest.mark.parametrize(
    ("cells", "delimiter"),
    [
        (["Action|Drama", "Drama", "N/A| Drama "], None),
        (['"Action, Drama"', "Drama", '"N/A,Drama"'], None),
        (["Action;Drama", "Drama", "N/A;Drama"], None),
        ([""""['Action', 'Drama']\"""", "['Drama']", """"['N/A', 'Drama']\""""], None),
        (["Action / Drama", "Drama", "N/A / Drama"], " / "),
    ],
)
def test_a_column_of_labels(cells: list[str], delimiter: str | None, tmp_path: Path) -> None:
    rows = "\n".join(f"{name},{cell}" for name, cell in zip("abc", cells, strict=True))
    table = read_table(_folder(tmp_path, f"id,genres\n{rows}\n"), delimiter=delimiter)
    assert table.class_names == ("Action", "Drama", "N/A")
    assert table.targets_NC.tolist() == [[1, 1, 0], [0, 1, 0], [0, 1, 1]]


def test_a_row_without_labels_is_kept(tmp_path: Path) -> None:
    table = read_table(_folder(tmp_path, "id,labels\na,X|Y\nb,\nc,[]\n"))
    assert table.targets_NC.tolist() == [[1, 1], [0, 0], [0, 0]]


@pytest.mark.parametrize("flags", [("0", "1"), ("0.0", "1.0"), ("False", "True"), (" 0", "1 ")])
def test_ways_to_write_flags(flags: tuple[str, str], tmp_path: Path) -> None:
    no, yes = flags
    table = read_table(_folder(tmp_path, f"path,A,B\na,{no},{yes}\nb.jpg,{yes},{yes}\n"))
    assert table.targets_NC.tolist() == [[0, 1], [1, 1]]


def test_a_path_column_beside_an_id_column_in_any_layout_of_folders(tmp_path: Path) -> None:
    csv = "file,x,Id\nImages/a.jpg,1,first\nsub/b.png,1,second\nc.JPEG,1,third\n"
    table = read_table(_folder(tmp_path, csv, "a sub/b.png c.JPEG"))
    assert table.ids == ("first", "second", "third")
    relative = [str(path.relative_to(tmp_path)) for path in table.paths]
    assert relative == ["Images/a.jpg", "Images/sub/b.png", "Images/c.JPEG"]


@pytest.mark.parametrize("images", ["Images", "images", "."])
def test_where_pictures_lie(images: str, tmp_path: Path) -> None:
    table = read_table(_folder(tmp_path, "Id,A\na,1\nb,0\n", "a b.PNG", images))
    assert [path.name for path in table.paths] == ["a.jpg", "b.PNG"]


def test_named_files_folders_and_columns(tmp_path: Path) -> None:
    data = _folder(tmp_path / "data", "Id,A\nz,1\n")
    shutil.copytree(data / "Images", tmp_path / "elsewhere")
    (data / "other.csv").write_text("poster,what,when,A\na,Z Y,val,1\nb,Z,TRAIN,2\n")
    table = read_table(
        data,
        csv="other.csv",
        images=tmp_path / "elsewhere",
        id_column="poster",
        label_column="what",
        delimiter=" ",
        split_column="when",
    )
    assert table.class_names == ("Y", "Z")
    assert table.given_split == ("validation", "train")
    assert table.ignored_columns == ("A",)
    assert table.paths[0] == tmp_path / "elsewhere" / "a.jpg"


def test_the_only_csv_of_a_folder_semicolons_and_a_byte_order_mark(tmp_path: Path) -> None:
    folder = _folder(tmp_path, "", "a b")
    (folder / "train.csv").unlink()
    (folder / "mine.csv").write_bytes("\ufeffId;A;split\r\na;1;test\r\n\r\nb;0;train\r\n".encode())
    table = read_table(folder)
    assert table.ids == ("a", "b")
    assert table.given_split == ("test", "train")


def test_columns_of_other_text_are_passed_over_and_listed(tmp_path: Path) -> None:
    csv = "Id,title,year,A,B\na,Alien,1979,1,0\nb,Brazil,1985,0,1\nc,Cube,1997,1,1\n"
    table = read_table(_folder(tmp_path, csv))
    assert table.class_names == ("A", "B")
    assert table.ignored_columns == ("title", "year")


def test_repeated_ids_with_equal_labels_are_kept(tmp_path: Path) -> None:
    table = read_table(_folder(tmp_path, "Id,A\na,1\nb,0\na,1\n"))
    assert table.ids == ("a", "b", "a")
    assert table.paths[0] == table.paths[2]


@pytest.mark.parametrize(
    ("csv", "message"),
    [
        ("", r"train\.csv: the CSV is empty"),
        ("Id,A\n", r"train\.csv: the CSV holds no rows"),
        ("Id,A\n\n\n", "the CSV holds no rows"),
        ("poster,A\na,1\n", r"no column names the pictures\n.*--id-column; columns: poster, A"),
        ("Id,when\na,1990\nb,1991\nc,1992\n", "no column holds labels"),
        ("Id\na\n", "no column holds labels"),
        ("Id,A,B\na,1,0\nb,2,1\nc,0,0\n", "column 'A': row 3 holds '2', which is neither 0 nor 1"),
        ("Id,A,B\na,1,0\n\nb,0,\nc,0,x\n", r"'B': row 4 holds '', .* \(and 1 more rows\)"),
        ("Id,A\na,yes\nb,no\n", "column 'A': row 2 holds 'yes'"),
        ("Id,A,A\na,1,0\nb,1,1\n", "two columns are called 'A'"),
        ("Id,A,\na,1,0\nb,1,1\n", "column 3 of the header has no name"),
        ("Id,A\na,1,1\n", "the CSV cannot be read: .*Expected 2 fields in line 2, saw 3"),
        ('Id,A\n"a,1\n', "the CSV cannot be read: .*EOF inside string"),
        ("Id,A\n,1\n", "row 2 holds '', which names no picture"),
        ("Id,A,split\na,1,train\nb,1,later\n", "column 'split': row 3 holds 'later'\n.*validation"),
        ("Id,genre\na,\nb,\n", "column 'genre': no row has a label"),
        ("Id,genre\na,['x'\nb,\"['x', 3]\"\n", "row 3 holds .*not a list of texts"),
        ("Id,A,B,C,D\na,1,0,1,0\nb,1,0,1,1\n", "2 rows are fewer than the 4 classes"),
        (
            "Id,A\na,1\nb,0\na,0\nb,1\na,1\nb,0\n",
            r"2 ids are repeated with different labels: a \(rows 2, 4\), b \(rows 3, 5\)\n",
        ),
        ("Id,A\na,1\nx,1\ny.png,0\n", r"2 of 3 pictures are missing: x \(row 3\), y.png \(row 4\)"),
        ("Id,A\n../../a,1\n", r"row 2 holds '\.\./\.\./a', which leaves the folder"),
        ("Id,A\na,1\n../../etc/b.jpg,1\n", "row 3 holds .*leaves the folder"),
        ("Id,A\n/etc/passwd.jpg,1\n", "row 2 holds '/etc/passwd.jpg', which leaves the folder"),
    ],
)
def test_bad_tables(csv: str, message: str, tmp_path: Path) -> None:
    # One folder down, so that `..` finds something that is no test's business.
    folder = _folder(tmp_path / "data", csv)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    with pytest.raises(InputError, match=message):
        read_table(folder)


def test_many_missing_pictures_are_counted_and_the_first_ones_named(tmp_path: Path) -> None:
    csv = "Id,A\n" + "".join(f"p{n},1\n" for n in range(50))
    with pytest.raises(InputError, match=r"50 of 50 .*: p0 .*, p4 \(row 6\), \.\.\.\n") as caught:
        read_table(_folder(tmp_path, csv))
    assert "p5" not in caught.value.problem
    assert caught.value.where == str(tmp_path / "Images")


def test_missing_pictures_may_be_left_to_the_check_of_pictures(tmp_path: Path) -> None:
    table = read_table(_folder(tmp_path, "Id,A\na,1\nx,1\nb,0\n"), allow_missing=True)
    problems = check_pictures(table.paths)
    assert [(p.row, p.reason) for p in problems] == [(1, "the picture is missing")]
    assert table.select([0, 2]).ids == ("a", "b")


@pytest.mark.parametrize("link", ["file", "folder"])
def test_symbolic_links_that_leave_the_folder(link: str, tmp_path: Path) -> None:
    outside = _folder(tmp_path / "outside", "", "secret")
    data = _folder(tmp_path / "data", "Id,A\nsecret,1\n")
    if link == "file":
        (data / "Images" / "secret.jpg").symlink_to(outside / "Images" / "secret.jpg")
    else:
        shutil.rmtree(data / "Images")
        (data / "Images").symlink_to(outside / "Images")
    with pytest.raises(InputError, match=r"'secret', which leaves the folder .*\n.*--images"):
        read_table(data)
    if link == "folder":  # Said on purpose, it is right.
        assert read_table(data, images=outside / "Images").num_images == 1


def test_links_that_stay_inside_and_a_link_to_the_whole_folder(tmp_path: Path) -> None:
    data = _folder(tmp_path / "data", "Id,A\na,1\nlink,1\n")
    (data / "Images" / "link.jpg").symlink_to(data / "Images" / "b.jpg")
    (tmp_path / "way").symlink_to(data)
    table = read_table(tmp_path / "way")
    assert table.root == data
    assert table.paths == (data / "Images" / "a.jpg", data / "Images" / "b.jpg")


def test_two_pictures_for_one_id(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'a' could be any of a\.jpg, a\.png"):
        read_table(_folder(tmp_path, "Id,A\na,1\n", "a a.png"))


def test_text_that_is_not_utf_8(tmp_path: Path) -> None:
    folder = _folder(tmp_path, "")
    (folder / "train.csv").write_bytes("Id,Comédie\na,1\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"train\.csv: the text is not UTF-8 .*\n.*CSV UTF-8"):
        read_table(folder)


def test_what_is_named_and_not_there(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "data", "Id,A\na,1\n")
    with pytest.raises(InputError, match="nowhere: there is no such folder"):
        read_table(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"other\.csv: there is no such CSV file"):
        read_table(folder, csv="other.csv")
    with pytest.raises(InputError, match="Pictures: there is no such folder of pictures"):
        read_table(folder, images="Pictures")
    for argument in ("id_column", "label_column", "split_column"):
        with pytest.raises(InputError, match=r"there is no column 'Genre'\n  columns: Id, A"):
            read_table(folder, **{argument: "Genre"})  # type: ignore[arg-type]
    (folder / "train.csv").unlink()
    with pytest.raises(InputError, match=r"data: no CSV file\n  name it with --csv"):
        read_table(folder)
    (folder / "one.csv").touch()
    (folder / "two.csv").touch()
    with pytest.raises(InputError, match=r"2 CSV files and none is train\.csv: one\.csv, two\.csv"):
        read_table(folder)


@pytest.fixture
def table(tmp_path: Path) -> Table:
    csv = "Id,A,B,split\na,1,0,train\nb,1,1,test\nc,0,0,train\n"
    return read_table(_folder(tmp_path / "data", csv))


def test_select_keeps_rows_in_the_order_asked(table: Table) -> None:
    part = table.select(np.array([2, 0]))
    assert part.ids == ("c", "a")
    assert part.paths == (table.paths[2], table.paths[0])
    assert part.targets_NC.tolist() == [[0, 0], [1, 0]]
    assert part.given_split == ("train", "train")
    assert part.class_names == table.class_names
    part.targets_NC[0, 0] = 1
    assert table.targets_NC[2, 0] == 0


def test_the_fingerprint_follows_content_and_not_place(table: Table, tmp_path: Path) -> None:
    known = table.fingerprint()
    assert len(known) == 64
    moved = shutil.copytree(table.root, tmp_path / "moved")
    assert read_table(moved).fingerprint() == known
    assert table.select([0, 1, 2]).fingerprint() == known
    assert table.select([0, 1]).fingerprint() != known
    assert table.select([1, 0, 2]).fingerprint() != known
    csv = (moved / "train.csv").read_text()
    for old, new in (("b,1,1", "b,1,0"), ("Id,A", "Id,Z")):
        (moved / "train.csv").write_text(csv.replace(old, new))
        assert read_table(moved).fingerprint() != known
    (moved / "train.csv").write_text(csv)
    with (moved / "Images" / "b.jpg").open("ab") as file:
        file.write(b"\0")
    assert read_table(moved).fingerprint() != known


def test_the_fingerprint_reads_each_file_once(table: Table) -> None:
    known = table.fingerprint()
    (table.root / "Images" / "a.jpg").unlink()
    assert table.fingerprint() == known
    assert table.select([0, 1, 2]).fingerprint() == known
    assert pickle.loads(pickle.dumps(table)).fingerprint() == known
    again = read_table(table.root, allow_missing=True)
    with pytest.raises(InputError, match=r"a\.jpg: the picture cannot be read"):
        again.fingerprint()


def test_describe(tmp_path: Path) -> None:
    csv = (
        "Id,A,B,N/A,split\na,1,0,0,train\nb,1,1,0,test\nc,0,0,0,train\na,1,0,0,train\nd,0,1,0,val\n"
    )
    folder = _folder(tmp_path, csv, "a b c")
    shutil.copy(folder / "Images" / "b.jpg", folder / "Images" / "d.jpg")
    report = describe(read_table(folder))
    assert (report.num_images, report.num_classes, report.num_labels) == (5, 3, 5)
    assert report.cardinality == 1.0
    assert report.label_counts == {"A": 3, "B": 2, "N/A": 0}
    assert report.classes_without_picture == ("N/A",)
    assert report.num_without_label == 1
    assert report.repeated_ids == {"a": 2}
    assert report.duplicate_groups == (("b", "d"),)
    assert report.given_split_counts == {"train": 3, "test": 1, "validation": 1}
    assert report.groups_across_given_split == (("b", "d"),)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["classes_without_picture"] == ["N/A"]
    assert values["duplicate_groups"] == [["b", "d"]]


def test_describe_with_known_groups_opens_no_picture(table: Table) -> None:
    for path in table.paths:
        path.unlink()
    report = describe(table, groups=np.array([0, 1, 0]))
    assert report.duplicate_groups == (("a", "c"),)
    assert report.groups_across_given_split == ()
    assert report.given_split_counts == {"train": 2, "test": 1}


def test_numbers_are_read_as_pandas_reads_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.integers(0, 2, (40, 6)), columns=list("UVWXYZ"))
    names = [f"p{n}" for n in range(40)]
    frame.insert(0, "Id", names)
    folder = _folder(tmp_path, frame.to_csv(index=False), " ".join(names))
    table = read_table(folder)
    np.testing.assert_array_equal(table.targets_NC, frame.iloc[:, 1:].to_numpy())


@pytest.mark.posters
def test_the_real_posters(posters_dir: Path) -> None:
    table = read_table(posters_dir)
    assert table.class_names == tuple(POSTER_GENRES)
    # Totals given by the set's README; genre counts by a plain count of the column of lists.
    assert (table.num_images, int(table.targets_NC.sum())) == (6156, 14303)
    lists = pd.read_csv(posters_dir / "train.csv", keep_default_na=False)["Genre"]
    counts = table.targets_NC.sum(axis=0)
    for genre, count in zip(POSTER_GENRES, counts, strict=True):
        assert lists.str.contains(f"'{genre}'", regex=False).sum() == count
    report = describe(table, groups=np.arange(table.num_images))
    assert report.cardinality == pytest.approx(14303 / 6156)
    assert report.repeated_ids == {}
    assert report.num_without_label == 0
    assert os.path.commonpath(table.paths) == str(table.root / "Images")
