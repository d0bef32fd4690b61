"""The MLflow UI on the studies of this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import urllib.parse

from core.errors import InputError

from ..addresses import canonical, check_tracking, without_password
from ..home import Home
from ..studies.study import open_study
from ..tracking.mlflow_store import STUDY

SHOWN_STUDIES = 5
END_SECONDS = 10


def serve_ui(home: Home, *, host: str, port: int, tracking_uri: str | None) -> int:
    """Run MLflow's server until it is stopped; returns its exit code.

    Raises InputError if the port is taken, or the address is a server's already.
    """
    uri = tracking_uri or home.tracking_uri
    if uri.startswith(("http://", "https://")):
        raise InputError(
            "this is a server already",
            where=f"--tracking-uri {without_password(uri)}",
            hint="open it in a browser",
        )
    check_tracking(uri)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"cannot be listened on ({error.strerror})",
                where=f"--host {host} --port {port}",
                hint="name another port, or an address of this machine",
            ) from error
    base = f"http://{host}:{port}"
    print(f"MLflow UI: {base}   (Ctrl-C ends it)")
    for name, link in study_links(home, canonical(uri), base).items():
        print(f"  trials of {name}, best first: {link}")
    sys.stdout.flush()
    command = [
        sys.executable, "-m", "mlflow", "server",
        "--backend-store-uri", canonical(uri),
        "--artifacts-destination", str(home.artifacts),
        "--host", host, "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    # A group of its own: MLflow's server starts helpers that outlive it if it alone is ended.
    # Its job runners, half a dozen processes for tasks of language models, are not needed.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with subprocess.Popen(command, env=environment, start_new_session=True) as server:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            return server.wait()
        except (KeyboardInterrupt, SystemExit):
            return 0
        finally:
            _end_group(server)


def _end_group(server: subprocess.Popen[bytes]) -> None:
    """End the server with everything that it started; by force after END_SECONDS."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(END_SECONDS)


def study_links(home: Home, tracking_uri: str, base: str) -> dict[str, str]:
    """The newest studies of this home that are tracked there: name -> page of their trials."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri)
    paths = sorted(home.studies.glob("*/study.json"), key=lambda path: -path.stat().st_mtime)
    links = {}
    for path in paths[:SHOWN_STUDIES]:
        study = open_study(home, path.parent.name)
        record = study.record
        experiment = client.get_experiment_by_name(record.model)
        if canonical(study.tracking_uri()) == tracking_uri and experiment is not None:
            query = urllib.parse.urlencode(
                {
                    "searchFilter": f"tags.`{STUDY}` = '{record.name}'",
                    "orderByKey": f"metrics.`best_validation_{record.space['objective']}`",
                    "orderByAsc": "false",
                },
                quote_via=urllib.parse.quote,
            )
            links[record.name] = f"{base}/#/experiments/{experiment.experiment_id}/runs?{query}"
    return links
