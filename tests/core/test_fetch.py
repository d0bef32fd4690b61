"""Fetching the public set: from folders, archives and a local server that breaks off."""

from __future__ import annotations

import csv
import io
import stat
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from core.data import download as download_module
from core.data import fetch
from core.data.download import download
from core.data.fetch import PUBLIC_COUNTS, PosterCounts, check_posters, fetch_posters
from core.errors import InputError

COUNTS = PosterCounts(num_rows=4, num_classes=2, num_images=5)


def _csv_text(ids: list[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["Id", "Genre", "Drama", "N/A"])
    writer.writerows([[i, "['Drama']", 1, 0] for i in ids])
    return text.getvalue()


def _set_files() -> dict[str, bytes]:
    files = {f"Images/tt{i}.jpg": bytes([i]) * (5000 + i) for i in range(1, 6)}
    return {"train.csv": _csv_text(["tt1", "tt2", "tt3", "tt3"]).encode(), **files}


def _zip(files: dict[str, bytes], prefix: str = "Movies-Poster_Dataset-HEAD/") -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(prefix + "Images/", b"")
        for name, content in files.items():
            archive.writestr(prefix + name, content)
    return packed.getvalue()


def _assert_complete(folder: Path) -> None:
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
    assert found == _set_files()


class _Server(ThreadingHTTPServer):
    """Serves one file; can break connections, change the file or know no ranges."""

    content: bytes = b""
    etag = '"v1"'
    ranges = True
    break_after: list[int]  # bytes sent before each of the next connections is cut
    status: int | None = None
    requests: list[str | None]  # the Range header of each request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/posters.zip"


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.requests.append(asked)
        if self.server.status is not None:
            self.send_error(self.server.status)
            return
        start = 0
        if asked and self.server.ranges and self.headers.get("If-Range") == self.server.etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        size = len(self.server.content)
        if start and start >= size:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = self.server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", self.server.etag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.end_headers()
        limit = self.server.break_after.pop(0) if self.server.break_after else len(body)
        self.wfile.write(body[:limit])

    def log_message(self, format: str, *args: object) -> None:
        """Keep test output clean."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setattr(download_module.time, "sleep", lambda seconds: None)
    server = _Server(("127.0.0.1", 0), _Handler)
    server.content, server.break_after, server.requests = _zip(_set_files()), [], []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join(timeout=10)
    server.server_close()


@pytest.mark.parametrize("prefix", ["", "Movies-Poster_Dataset-HEAD/", "a/b/"])
def test_fetch_from_a_zip_file(tmp_path: Path, prefix: str) -> None:
    archive = tmp_path / "set.zip"
    files = {**_set_files(), "README.md": b"no", "Images/notes.txt": b"no", "other/x.jpg": b"no"}
    archive.write_bytes(_zip(files, prefix))
    assert fetch_posters(tmp_path / "posters", source=archive) == COUNTS
    _assert_complete(tmp_path / "posters")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["posters", "set.zip"]


def test_fetch_from_a_folder(tmp_path: Path) -> None:
    for name, content in {**_set_files(), "README.md": b"no"}.items():
        target = tmp_path / "mirror" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    assert fetch_posters(tmp_path / "posters", source=str(tmp_path / "mirror")) == COUNTS
    _assert_complete(tmp_path / "posters")


def test_fetch_from_a_server_reports_progress(tmp_path: Path, server: _Server) -> None:
    seen: list[tuple[int, int | None]] = []
    folder = tmp_path / "new" / "posters"
    counts = fetch_posters(folder, source=server.url, progress=lambda *step: seen.append(step))
    assert counts == COUNTS
    _assert_complete(folder)
    size = len(server.content)
    assert seen[0] == (0, size) and seen[-1] == (size, size)
    assert [p.name for p in folder.parent.iterdir()] == ["posters"], "nothing is left beside it"


def test_a_broken_connection_is_taken_up_where_it_broke(tmp_path: Path, server: _Server) -> None:
    server.break_after = [7000, 3000]
    fetch_posters(tmp_path / "posters", source=server.url)
    assert server.requests == [None, "bytes=7000-", "bytes=10000-"]
    _assert_complete(tmp_path / "posters")


def test_the_next_call_goes_on_where_the_last_one_stopped(tmp_path: Path, server: _Server) -> None:
    server.break_after = [9000, 0, 0, 0, 0]
    with pytest.raises(InputError, match=r"9,000 bytes are kept, the same command goes on"):
        fetch_posters(tmp_path / "posters", source=server.url)
    assert not (tmp_path / "posters").exists()
    server.break_after, server.requests = [], []
    fetch_posters(tmp_path / "posters", source=server.url)
    assert server.requests == ["bytes=9000-"]
    _assert_complete(tmp_path / "posters")


def test_a_part_of_another_version_is_not_continued(tmp_path: Path, server: _Server) -> None:
    target = tmp_path / "file"
    server.break_after = [9000, 0, 0, 0, 0]
    with pytest.raises(InputError, match="the connection ended after 9,000 of"):
        download(server.url, target)
    server.content, server.etag, server.break_after = b"new" * 9000, '"v2"', []
    download(server.url, target)
    assert target.read_bytes() == server.content
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_complete_part_is_not_downloaded_again(tmp_path: Path, server: _Server) -> None:
    target = tmp_path / "file"
    server.break_after = [9000, 0, 0, 0, 0]
    with pytest.raises(InputError, match="download failed"):
        download(server.url, target)
    (tmp_path / "file.part").write_bytes(server.content)
    download(server.url, target)
    assert target.read_bytes() == server.content
    assert server.requests[-1] == f"bytes={len(server.content)}-"


@pytest.mark.parametrize("etag", ['"v1"', 'W/"v1"'])
def test_servers_that_cannot_resume_start_over(tmp_path: Path, server: _Server, etag: str) -> None:
    server.ranges, server.etag, server.break_after = False, etag, [7000, 8000]
    download(server.url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == server.content


def test_offline_says_what_to_do(tmp_path: Path, server: _Server) -> None:
    url = server.url
    server.server_close()
    with pytest.raises(InputError, match="download failed") as caught:
        fetch_posters(tmp_path / "posters", source=url)
    assert f"fetch {url} elsewhere" in str(caught.value)
    assert "tuner data fetch posters --from FILE" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_is_not_asked_again(tmp_path: Path, server: _Server) -> None:
    server.status = 404
    with pytest.raises(InputError, match="the server answers 404 Not Found"):
        fetch_posters(tmp_path / "posters", source=server.url)
    assert len(server.requests) == 1


def test_a_busy_server_is_asked_again(tmp_path: Path, server: _Server) -> None:
    server.status = 503
    with pytest.raises(InputError, match="the server answers 503"):
        download(server.url, tmp_path / "file")
    assert len(server.requests) == 2


def test_the_public_archive_must_have_the_public_counts(
    tmp_path: Path, server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "POSTERS_URL", server.url)
    with pytest.raises(InputError, match=r"holds 4 rows.*public set has 7,254 rows, 25 classes"):
        fetch_posters(tmp_path / "posters", source=server.url)
    kept = tmp_path / "posters.zip"
    assert fetch_posters(tmp_path / "posters", source=kept) == COUNTS

    monkeypatch.setattr(fetch, "PUBLIC_COUNTS", COUNTS)
    fetch_posters(tmp_path / "again", source=server.url)
    _assert_complete(tmp_path / "again")


def test_public_counts_agree_with_the_published_totals() -> None:
    num_repeated_ids, num_without_labels = 12, 625
    distinct = PUBLIC_COUNTS.num_rows - num_repeated_ids
    assert PUBLIC_COUNTS.num_images == distinct + num_without_labels


@pytest.mark.parametrize(
    "name",
    ["../evil.jpg", "Images/../../evil.jpg", "/evil.jpg", "C:/evil.jpg", "Images\\..\\e.jpg"],
)
def test_an_archive_cannot_write_elsewhere(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "in" / "set.zip"
    archive.parent.mkdir()
    archive.write_bytes(_zip({**_set_files(), name: b"evil"}, prefix=""))
    with pytest.raises(InputError, match="unsafe entry"):
        fetch_posters(tmp_path / "in" / "posters", source=archive)
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "set.zip"]


def test_an_archive_with_a_link_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "set.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("train.csv", _csv_text(["tt1"]))
        link = zipfile.ZipInfo("Images/tt1.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        packed.writestr(link, "/etc/passwd")
    with pytest.raises(InputError, match=r"unsafe entry 'Images/tt1\.jpg'"):
        fetch_posters(tmp_path / "posters", source=archive)


def test_an_archive_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_MAX_UNPACKED_BYTES", 20_000)
    archive = tmp_path / "set.zip"
    archive.write_bytes(_zip(_set_files()))
    with pytest.raises(InputError, match="more than 20,000"):
        fetch_posters(tmp_path / "posters", source=archive)


@pytest.mark.parametrize("damage", ["cut", "flipped", "text"])
def test_a_damaged_archive_is_refused(tmp_path: Path, damage: str) -> None:
    good = _zip(_set_files())
    bad = {"cut": good[:9000], "flipped": good.replace(b"\x03" * 50, b"\x07" * 50), "text": b"hi"}
    archive = tmp_path / "set.zip"
    archive.write_bytes(bad[damage])
    with pytest.raises(InputError, match="not a readable zip file"):
        fetch_posters(tmp_path / "posters", source=archive)
    assert not (tmp_path / "posters").exists()


def test_a_damaged_download_is_not_kept(tmp_path: Path, server: _Server) -> None:
    server.content = b"<html>Please log in</html>"
    with pytest.raises(InputError, match="not a readable zip file"):
        fetch_posters(tmp_path / "posters", source=server.url)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"readme.txt": b"x"}, "holds no poster set"),
        ({"train.csv": b"Name,Drama\nx,1\n"}, "not a table with a column Id"),
        ({"train.csv": b""}, "not a table with a column Id"),
        ({"train.csv": b"\xff\xfe\x00"}, "not a table with a column Id"),
        ({"train.csv": b"Id,Genre,Drama\n"}, "has no rows"),
        (
            {"train.csv": _csv_text([f"tt{i}" for i in range(9)]).encode(), "Images/tt1.jpg": b"x"},
            r"8 of 9 rows of train.csv have no picture in Images/: tt0, tt2, tt3, tt4, tt5, \.\.\.",
        ),
    ],
)
def test_what_is_no_poster_set_is_refused(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    archive = tmp_path / "set.zip"
    archive.write_bytes(_zip(files))
    with pytest.raises(InputError, match=message):
        fetch_posters(tmp_path / "posters", source=archive)
    assert not (tmp_path / "posters").exists()


def test_missing_and_wrong_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.zip: no such file or folder"):
        fetch_posters(tmp_path / "posters", source=tmp_path / "nowhere.zip")
    with pytest.raises(InputError, match="holds no poster set"):
        fetch_posters(tmp_path / "posters", source=tmp_path)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty and nothing is overwritten"):
        fetch_posters(tmp_path, source=tmp_path / "set.zip")
    with pytest.raises(InputError, match="is a file, but a folder is to be made"):
        fetch_posters(tmp_path / "mine.txt", source=tmp_path / "set.zip")
    assert (tmp_path / "mine.txt").read_text() == "precious"


@pytest.mark.posters
def test_the_development_posters_are_a_mirror(tmp_path: Path, posters_dir: Path) -> None:
    counts = check_posters(posters_dir, where=str(posters_dir))
    assert counts.num_classes == PUBLIC_COUNTS.num_classes
    assert 0 < counts.num_rows <= counts.num_images
