"""A DashScope on loopback: answers what the test says, and keeps what it was asked."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TEXT_PATH = "/api/v1/services/aigc/text-generation/generation"
VISION_PATH = "/api/v1/services/aigc/multimodal-generation/generation"


class DashScopeStub:
    """`replies` are used up in order, the last one for ever: (status, text or error code)."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.replies: list[tuple[int, str]] = [(200, "A cat, at length.")]
        self.delay_s = 0.0
        self.asked: list[dict[str, Any]] = []

    def answer(self, path: str, headers: Any, body: bytes) -> tuple[int, bytes]:
        self.asked.append(
            {"path": path, "key": headers.get("Authorization"), **json.loads(body or b"{}")}
        )
        status, text = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        time.sleep(self.delay_s)
        if status != 200:
            return status, json.dumps({"code": text, "message": "no", "request_id": "r"}).encode()
        content = text if path == TEXT_PATH else [{"text": text}]
        message = {"role": "assistant", "content": content}
        choices = [{"finish_reason": "stop", "message": message}]
        return 200, json.dumps({"output": {"choices": choices}, "request_id": "r"}).encode()


@contextlib.contextmanager
def dashscope_stub() -> Iterator[DashScopeStub]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer = stub.answer(self.path, self.headers, body)
            with contextlib.suppress(ConnectionError):  # a caller may have given up
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            """Silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub = DashScopeStub(f"http://127.0.0.1:{server.server_port}/api/v1")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
