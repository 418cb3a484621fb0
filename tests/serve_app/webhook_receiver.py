"""A webhook receiver on loopback, in a thread: answers as told and keeps what it was sent."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# 32 bytes, as `openssl rand -base64 32` would make them.
SECRET = "whsec_" + "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


@dataclass
class Receiver:
    """`answers` are the statuses of the next requests, then 200; `requests` are (headers, body).

    A status of 0 is no answer: the connection stays open in silence.
    """

    url: str = ""
    answers: list[int] = field(default_factory=list)
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    silence_ends: threading.Event = field(default_factory=threading.Event)

    def wait_for(self, num_requests: int, timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while len(self.requests) < num_requests:
            assert time.monotonic() < deadline, f"{len(self.requests)} of {num_requests} requests"
            time.sleep(0.02)


@contextlib.contextmanager
def receiving() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status = receiver.answers.pop(0) if receiver.answers else 200
            receiver.requests.append((headers, body))
            if status == 0:
                receiver.silence_ends.wait(30)
                return
            self.send_response(status)
            if status in (301, 302, 307, 308):
                self.send_header("Location", receiver.url + "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield receiver
    finally:
        receiver.silence_ends.set()
        server.shutdown()
        thread.join()
        server.server_close()
