"""A stub of an OpenAI-compatible endpoint for the tests: `with serve(replies) as (url, seen):`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def serve(
    replies: Callable[[str], str] | Sequence[Any], *, retry_after: str | None = None
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(address, requests seen). `replies`: a function of the prompt, or one entry a request: a text, an HTTP status, a
    whole body, or bytes that the connection ends with, before the reply is whole."""
    seen: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                reply = replies(body["messages"][0]["content"]) if callable(replies) else replies[len(seen)]
                seen.append({"body": body, "path": self.path, "authorization": self.headers.get("Authorization")})
            status = reply if isinstance(reply, int) else 200
            if isinstance(reply, int):
                reply = {"error": {"message": f"status {reply}"}}
            elif isinstance(reply, str):
                reply = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
            content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) + isinstance(reply, bytes)))
            if retry_after is not None:
                self.send_header("Retry-After", retry_after)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
