"""The MLflow UI on the studies of this machine."""

from __future__ import annotations

import socket
import subprocess
import sys

from core.errors import InputError

from .addresses import canonical, check_tracking
from .home import Home


def serve_ui(home: Home, *, host: str, port: int, tracking_uri: str | None) -> int:
    """Run MLflow's server until it is stopped; returns its exit code.

    Raises InputError if the port is taken, or the address is a server's already.
    """
    uri = tracking_uri or home.tracking_uri
    if uri.startswith(("http://", "https://")):
        raise InputError(
            "this is a server already", where=f"--tracking-uri {uri}", hint="open it in a browser"
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
    print(f"MLflow UI: http://{host}:{port}   (Ctrl-C ends it)", flush=True)
    command = [
        sys.executable, "-m", "mlflow", "server",
        "--backend-store-uri", canonical(uri),
        "--artifacts-destination", str(home.artifacts),
        "--host", host, "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    with subprocess.Popen(command) as server:
        try:
            return server.wait()
        except KeyboardInterrupt:
            server.terminate()
            return server.wait()
