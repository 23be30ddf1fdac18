"""What every request must pass before anything reads it: the host's name, the key, the body's size and kind.

Plain ASGI, around the whole application. No answer repeats what was sent."""

from __future__ import annotations

import hmac
import json
from collections.abc import Sequence
from contextlib import suppress

OPEN = ("/health", "/", "/page.js", "/page.css")  # need no key: they say nothing about anybody's text or traffic
SAFE = (
    (b"content-security-policy", b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


def shaped(status: int, message: str, kind: str = "invalid_request_error", param=None, code=None) -> dict:
    """An error as OpenAI's clients expect it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code or str(status)}}


class _TooLarge(Exception):
    pass


class Guard:
    """key: that clients must send (Authorization: Bearer KEY), None for none. hosts: names by which the server may be
    called, () for any: on loopback this keeps out web pages that call it under a name of their own. max_body: bytes."""

    def __init__(self, app, key: str | None = None, hosts: Sequence[str] = (), max_body: int = 1 << 20):
        self.app, self.key, self.hosts, self.max_body = app, key, tuple(hosts), max_body

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        refused = self._refused(scope, headers)
        if refused is not None:
            await _answer(send, *refused)
            return
        read = 0

        async def counted():
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body:
                raise _TooLarge
            return message

        async def careful(message):
            if read > self.max_body:  # whatever the application made of it
                return
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *SAFE]}
            await send(message)

        with suppress(_TooLarge):
            await self.app(scope, counted, careful)
        if read > self.max_body:
            await _answer(send, *self._too_large())

    def _refused(self, scope, headers: dict[bytes, bytes]) -> tuple[int, dict] | None:
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.hosts and name not in self.hosts:
            return 403, shaped(403, f"this server answers to {', '.join(self.hosts)} only. Name others with --host.")
        if self.key is not None and scope["path"] not in OPEN:
            sent = headers.get(b"authorization", b"")
            if not hmac.compare_digest(sent, b"Bearer " + self.key.encode()):
                message = "a key is needed: send the header 'Authorization: Bearer KEY' with the server's ZSAA_API_KEY."
                return 401, shaped(401, message, "authentication_error", code="invalid_api_key")
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if kind != b"application/json":  # a web page cannot send this to another site without being asked back
                return 415, shaped(415, "the body must be JSON: send the header 'Content-Type: application/json'.")
            length = headers.get(b"content-length", b"0")
            if not length.isdigit() or int(length) > self.max_body:
                return self._too_large()
        return None

    def _too_large(self) -> tuple[int, dict]:
        return 413, shaped(413, f"the body may have {self.max_body} bytes at most. Send a shorter text.")


async def _answer(send, status: int, content: dict) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *SAFE]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
