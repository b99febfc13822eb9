"""The judge: a model behind any OpenAI-compatible endpoint, asked at temperature 0 with nothing but the stdlib."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

LOCAL = ("localhost", "127.0.0.1", "::1")
WORTH_A_RETRY = (408, 409, 425, 429)  # and every 5xx


@dataclass(frozen=True)
class Judge:
    """Asks `url`/chat/completions as `model`.

    Args:
        url: up to and with the version, e.g. http://localhost:8000/v1.
        key: sent as a bearer token where there is one; stored nowhere.
        tries: requests before giving up, with waits of `wait_s`, twice that, ... (or what Retry-After says) between.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    tries: int = 6
    wait_s: float = 1.0
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise ValueError(f"--judge {self.url} is no address; it looks like http://localhost:8000/v1")

    def __call__(self, prompt: str, stop: threading.Event | None = None) -> str:
        """The reply to one prompt. ValueError where the endpoint refuses, or does not answer in `tries` tries.

        stop: once it is set, no further try is made.
        """
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        problem, wait = "", self.wait_s
        for attempt in range(self.tries):
            if attempt and stop is None:
                time.sleep(wait)
            elif attempt and stop is not None and stop.wait(wait):
                break
            wait = min(60.0, self.wait_s * 2**attempt)
            try:
                return _text(self._post(json.dumps(body).encode()))
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {_message(error) or error.reason}"
                if error.code < 500 and error.code not in WORTH_A_RETRY:
                    raise ValueError(f"the judge {self.model} at {self.url} refuses: {problem}") from error
                wait = _retry_after(error.headers.get("Retry-After")) or wait
            except (OSError, ValueError, http.client.HTTPException) as error:
                # no connection, a timeout, half a reply, or none
                problem = str(getattr(error, "reason", error)) or type(error).__name__
        raise ValueError(
            f"the judge {self.model} at {self.url} did not answer in {self.tries} tries ({problem}); what it said "
            "before is kept: run the same command again to go on"
        )

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        local = urlsplit(self.url).hostname in LOCAL  # a proxy of the environment cannot reach it
        opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))
        with opener.open(request, timeout=self.timeout_s) as response:
            return response.read()


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return error.read()[:300].decode(errors="replace").strip()
    except (OSError, http.client.HTTPException):
        return ""


def _text(body: bytes) -> str:
    try:
        reply: Any = json.loads(body)["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"its reply has no choices[0].message.content: {body[:200]!r}") from error
    return reply or ""


def _retry_after(seconds: str | None) -> float | None:
    """Retry-After where it is a number of seconds (it may be a date), at most a minute."""
    try:
        return min(60.0, float(seconds)) if seconds else None
    except ValueError:
        return None
