"""A client that calls an ASGI application in this process and can leave in the middle."""

import asyncio
import json
from dataclasses import dataclass, field


@dataclass
class Response:
    status: int = 0
    headers: dict = field(default_factory=dict)
    pieces: list = field(default_factory=list)

    @property
    def body(self):
        return b"".join(self.pieces)

    def json(self):
        return json.loads(self.body)

    def events(self):
        """The data of server-sent events; "[DONE]" as it is."""
        lines = [line[6:] for line in self.body.decode().split("\n\n") if line]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def call(app, path, body=None, method=None, headers=None, leave=None, chunks=None):
    """One request. leave: an asyncio.Event, at which the client goes away. chunks: the body in pieces, as bytes."""
    sent = json.dumps(body).encode() if body is not None and not isinstance(body, bytes) else body or b""
    chunks = [sent] if chunks is None else list(chunks)
    given = {"host": "127.0.0.1:8000"} | ({"content-type": "application/json"} if body is not None else {})
    given |= {} if headers is None else headers
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method or ("GET" if body is None else "POST"),
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(k.lower().encode(), v.encode()) for k, v in given.items() if v is not None],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    response, over = Response(), asyncio.Event()

    async def receive():
        if chunks:
            piece = chunks.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(chunks)}
        await (leave or over).wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if leave is not None and leave.is_set():
            raise OSError("the client has left")
        if message["type"] == "http.response.start":
            response.status = message["status"]
            response.headers = {k.decode().lower(): v.decode() for k, v in message["headers"]}
        else:
            response.pieces.append(message.get("body", b""))

    await app(scope, receive, send)
    over.set()
    return response
