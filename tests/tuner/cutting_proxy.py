"""A connection to PostgreSQL that breaks at a COMMIT of the test's choice.

`before`: the server never hears of it. `after`: it has done the work, and its client cannot know.
`late`: the same, but it does the work when its client has been trying again for a while.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Literal, Self

COMMIT = b"COMMIT\x00"
"""As libpq sends it, after a `Q` and a length."""
LATE_SECONDS = 0.4
Moment = Literal["before", "after", "late"]


class CuttingProxy:
    """Listens on a port of the loopback and passes all on to the server's, until it is to cut."""

    def __init__(self, server_port: int) -> None:
        self._server = ("127.0.0.1", server_port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.num_commits = 0
        self.num_cuts = 0
        self._cut: tuple[int, Moment, Callable[[], None]] | None = None

    def cut_at(self, commit: int, moment: Moment, then: Callable[[], None] = lambda: None) -> None:
        """Break the connection at the commit of this number, counted from now (1 is the next).
        `then` is called before the client hears of it."""
        self.num_commits = self.num_cuts = 0
        self._cut = (commit, moment, then)

    def cut_nothing(self) -> None:
        self._cut = None

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # Closed.
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.create_connection(self._server)
        answered, lost = threading.Event(), threading.Event()

        def answer() -> None:
            while data := _received(server):
                answered.set()
                if not lost.is_set():
                    client.sendall(data)

        threading.Thread(target=answer, daemon=True).start()
        with client, server:
            while data := _received(client):
                moment = self._moment(data)
                if moment is not None:
                    lost.set()
                if moment == "late":
                    _end(client)
                    time.sleep(LATE_SECONDS)
                if moment in ("after", "late"):
                    answered.clear()
                    server.sendall(data)
                    assert answered.wait(60)
                if moment is not None:
                    break
                server.sendall(data)
            _end(server)
            if lost.is_set() and self._then is not None:
                self._then()
            _end(client)

    def _moment(self, data: bytes) -> Moment | None:
        """How to cut the connection now; None to go on."""
        if COMMIT not in data:
            return None
        self.num_commits += 1
        if self._cut is None or self.num_commits != self._cut[0]:
            return None
        _, moment, self._then = self._cut
        self._cut = None
        self.num_cuts += 1
        return moment

    _then: Callable[[], None] | None = None


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65536)
    except OSError:
        return b""


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
