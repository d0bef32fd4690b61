"""A proxy before a real server, that loses what tests want lost: answers, or every connection."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class LossyProxy:
    """Hands requests on to `target`. A lost answer: the server did what it was asked for, and the
    client does not hear of it."""

    def __init__(self, target: str) -> None:
        self.address = ""
        self.away = False
        """Requests are cut off before the server hears of them."""
        self.loses: Callable[[str, str, bytes], bool] = lambda method, path, body: False
        """Whether the answer to this request is lost."""
        self.lost: list[str] = []
        """Paths of requests whose answer was lost."""
        self._target = urlsplit(target)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        size = int(handler.headers.get("Content-Length") or 0)
        body = handler.rfile.read(size)
        if self.away:
            handler.close_connection = True
            return
        server = http.client.HTTPConnection(str(self._target.hostname), self._target.port or 80)
        headers = {k: v for k, v in handler.headers.items() if k.lower() != "connection"}
        server.request(handler.command, handler.path, body, headers)
        answer = server.getresponse()
        content = answer.read()
        server.close()
        if self.loses(handler.command, handler.path, body):
            self.lost.append(handler.path)
            handler.close_connection = True
            return
        handler.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in ("connection", "transfer-encoding", "content-length", "date"):
                handler.send_header(key, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)


@contextmanager
def lossy_proxy(target: str) -> Iterator[LossyProxy]:
    """A proxy on loopback that ends with the block."""
    proxy = LossyProxy(target)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            proxy.answer(self)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

        def log_message(self, *_: object) -> None:
            """Nothing on the screen."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
