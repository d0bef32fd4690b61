"""Passwords in addresses: in a file of the study that only its owner can read, and nowhere else.

`study.json` goes to MLflow, to the study's attributes and to colleagues, and names addresses
without them. Who moves a study's folder to another account takes that file along, or names the
password in the usual ways (PGPASSWORD and ~/.pgpass, MLFLOW_TRACKING_USERNAME and _PASSWORD).
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

FILE = "credentials.json"
_HTTP_USER = re.compile(r"^(https?://)[^/?#]*@")
_PASSWORD = re.compile(r"^([A-Za-z][\w+.-]*://[^:/@]*):[^@]*@")
_SECRET_OPTION = re.compile(r"([?&])(?:password|sslpassword|passwd)=[^&]*&?")


def without_credentials(url: str) -> str:
    """The address as it is recorded: of HTTP without user and password, else without password."""
    if _HTTP_USER.match(url):
        return _HTTP_USER.sub(r"\1", url)
    return _SECRET_OPTION.sub(r"\1", _PASSWORD.sub(r"\1@", url)).rstrip("?&")


def keep_credentials(folder: Path, addresses: Mapping[str, str | None]) -> None:
    """Write those addresses that hold a password into `folder`, readable by the owner alone."""
    kept = {n: url for n, url in addresses.items() if url and url != without_credentials(url)}
    if not kept:
        return
    draft = folder / f".{FILE}.{secrets.token_hex(4)}"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(kept, file)
    os.replace(draft, folder / FILE)


def copy_credentials(source: Path, target: Path) -> None:
    """What one study's folder knows, to another of the same addresses."""
    keep_credentials(target, _kept(source))


def full_address(folder: Path, name: str, recorded: str) -> str:
    """The address `recorded` with its credentials, if `folder` has them. One that was changed in
    the record since gets none."""
    kept = _kept(folder).get(name)
    if kept is None or without_credentials(kept) != recorded:
        return recorded
    return kept


def _kept(folder: Path) -> dict[str, str]:
    try:
        kept: dict[str, str] = json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        return {}
    return kept
