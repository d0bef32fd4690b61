"""Downloads one file over HTTP, and goes on where it stopped: after a break, or on the next call.

What has arrived lies in `NAME.part`; `NAME.part.json` holds where from and the server's mark of
that version (ETag or date), without which a part is not trusted and the download starts over.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from ..errors import InputError

Progress = Callable[[int, int | None], None]
"""Called with the bytes done and the bytes in total (None if the server does not say)."""

_CHUNK = 1 << 16
_TIMEOUT_S = 15
_TRIES = 4


class _BrokenError(Exception):
    """The connection ended before the file did."""


def download(url: str, target: Path, *, progress: Progress | None = None) -> None:
    """Download `url` (http or https) to the file `target`, which appears when it is complete.

    A connection that breaks is taken up again, up to four times in a row without a new byte.

    Raises:
        InputError: the server cannot be reached, refuses, or keeps breaking off. What has arrived
            stays for the next call, unless nothing has.
    """
    part = target.with_name(target.name + ".part")
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch_rest(url, part, progress)
            break
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            error.close()
            if error.code == 416:  # Nothing is left to ask for, or the part is no prefix.
                if error.headers.get("Content-Range") == f"bytes */{before}":
                    break
                _forget(part)
            elif error.code < 500 and error.code != 429:
                raise _failure(url, reason, part) from error
        except (urllib.error.URLError, OSError, http.client.HTTPException, _BrokenError) as error:
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        arrived = part.exists() and part.stat().st_size > before
        failures = 1 if arrived else failures + 1
        if failures >= _TRIES or (failures >= 2 and before == 0):
            raise _failure(url, reason, part)
        time.sleep(0.2 * failures)
    part.replace(target)
    _forget(part)


def _fetch_rest(url: str, part: Path, progress: Progress | None) -> None:
    """One request for what is missing; raises whatever broke it."""
    request = urllib.request.Request(url, headers={"User-Agent": "poster-tuner"})
    have, mark = _resume_point(url, part)
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", mark)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
        if response.status != 206:
            have = 0
        elif not str(response.headers.get("Content-Range")).startswith(f"bytes {have}-"):
            _forget(part)
            raise _BrokenError("the server sent another range than asked for")
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        mark = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        if have == 0:
            _forget(part)
            _marks(part).write_text(json.dumps({"url": url, "mark": mark}), encoding="utf-8")
        with open(part, "ab" if have else "wb") as file:
            done = _copy(response, file, have, total, progress)
    if total is not None and done < total:
        raise _BrokenError(f"the connection ended after {done:,} of {total:,} bytes")


def _copy(
    response: http.client.HTTPResponse,
    file: IO[bytes],
    done: int,
    total: int | None,
    progress: Progress | None,
) -> int:
    """Append what the response holds to the file; the bytes that the file then has."""
    if progress is not None:
        progress(done, total)
    while chunk := response.read(_CHUNK):
        file.write(chunk)
        done += len(chunk)
        if progress is not None:
            progress(done, total)
    return done


def _resume_point(url: str, part: Path) -> tuple[int, str]:
    """How many bytes of this very version are here, and the mark to ask for the rest with."""
    try:
        notes: Any = json.loads(_marks(part).read_text(encoding="utf-8"))
        have = part.stat().st_size
    except (OSError, ValueError):
        return 0, ""
    mark = notes.get("mark", "") if isinstance(notes, dict) and notes.get("url") == url else ""
    # A weak ETag promises no equal bytes (RFC 9110, 13.1.5), so it cannot be resumed on.
    if not isinstance(mark, str) or not mark or mark.startswith("W/"):
        return 0, ""
    return have, mark


def _marks(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _marks(part).unlink(missing_ok=True)


def _failure(url: str, reason: str, part: Path) -> InputError:
    have = part.stat().st_size if part.exists() else 0
    if not have:
        _forget(part)
    kept = f"; {have:,} bytes are kept, the same command goes on from there" if have else ""
    return InputError(f"download failed: {reason}{kept}", where=url)
