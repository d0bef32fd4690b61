"""Where MLflow keeps the files of a new experiment (`--artifacts`), checked before anything starts.

A folder, or `s3://BUCKET/PREFIX` of Amazon or of any store that speaks its language: MLflow itself
writes and reads there, with the usual variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_DEFAULT_REGION, MLFLOW_S3_ENDPOINT_URL). An experiment keeps the place that it was made with.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from core.errors import InputError

from ..addresses import ANSWER_SECONDS, first_line
from .mlflow_store import artifact_location, find_experiment

FLAG = "--artifacts"
S3 = "s3://"
FORMS = "a folder, or s3://BUCKET/PREFIX"


def artifact_url(text: str) -> str:
    """What a person wrote as a URL: `file://` for a folder, or `s3://`.

    Raises InputError for anything else, and for a URL that holds a password.
    """
    scheme = text.partition("://")[0] if "://" in text else ""
    if scheme == "s3":
        parts = urlsplit(text)
        if not parts.netloc or parts.query or parts.fragment:
            raise InputError("this names no bucket", where=f"{FLAG} {text}", hint=FORMS)
        if "@" in parts.netloc:
            raise InputError(
                "keys do not belong into the address",
                where=f"{FLAG} s3://***@{parts.netloc.rpartition('@')[2]}{parts.path}",
                hint="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile",
            )
        return text.rstrip("/")
    if scheme not in ("", "file") or not text.strip():
        raise InputError("artifacts cannot be kept there", where=f"{FLAG} {text}", hint=FORMS)
    path = unquote(urlsplit(text).path) if scheme else text
    return Path(path).expanduser().absolute().as_uri()


def check_artifacts(url: str | None, *, tracking_uri: str, experiment: str) -> None:
    """Whether an experiment's artifacts can be kept at `url`, or where the experiment has them.

    Args:
        url: of `artifact_url`; None where nothing was asked for.
        tracking_uri: MLflow's address, which answers.

    Raises InputError if the experiment is there with another place, or the place cannot be used.
    """
    found = find_experiment(tracking_uri, experiment)
    place = None if url is None else artifact_location(url, tracking_uri, experiment)
    if found is not None:
        there = str(found.artifact_location).rstrip("/")
        if url is not None and there not in (url, place):
            raise InputError(
                f"the experiment {experiment!r} is there already, with its artifacts in {there}",
                where=f"{FLAG} {url}",
                hint="leave the flag out, or name another experiment with --model",
            )
        place = there
    if place is not None and place.startswith(S3):
        check_bucket(place)
    elif url is not None:
        _check_folder(Path(unquote(urlsplit(url).path)))


def check_bucket(url: str) -> None:
    """Raises InputError if the bucket of an `s3://` address does not answer, or without boto3."""
    require_boto3(url)
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    parts = urlsplit(url)
    settings = Config(
        connect_timeout=ANSWER_SECONDS / 2,
        read_timeout=ANSWER_SECONDS / 2,
        retries={"total_max_attempts": 1},
        s3={"addressing_style": os.environ.get("MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE", "auto")},
    )
    ignore_tls = os.environ.get("MLFLOW_S3_IGNORE_TLS", "").lower() in ("true", "1")
    endpoint = os.environ.get("MLFLOW_S3_ENDPOINT_URL") or None
    try:
        # A session of its own: the shared one keeps the first keys that it found.
        client = boto3.session.Session().client(
            "s3", endpoint_url=endpoint, verify=False if ignore_tls else None, config=settings
        )
        client.head_bucket(Bucket=parts.netloc)
    except (BotoCoreError, ClientError, ValueError) as error:
        raise InputError(
            f"the bucket cannot be used ({_why(error)})",
            where=f"s3://{parts.netloc}" + (f" at {endpoint}" if endpoint else ""),
            hint="look at its name, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, and "
            "MLFLOW_S3_ENDPOINT_URL for a store that is not Amazon's",
        ) from error


def require_boto3(url: str) -> None:
    """Raises InputError if the package that reads and writes `s3://` addresses is missing."""
    try:
        import boto3  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"S3 needs a package that is not there ({first_line(error)})",
            where=url,
            hint="pip install 'poster-tuner[s3]'",
        ) from error


def _why(error: Exception) -> str:
    response = getattr(error, "response", None) or {}
    code = str(response.get("Error", {}).get("Code", ""))
    known = {
        "404": "there is no such bucket",
        "403": "access is denied",
        "301": "it is in another region: AWS_DEFAULT_REGION",
    }
    return known.get(code) or first_line(error)


def _check_folder(folder: Path) -> None:
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(
            f"{nearest} cannot be written", where=f"{FLAG} {folder}", hint="name another folder"
        )
