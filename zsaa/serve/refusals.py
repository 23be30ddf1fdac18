"""Answers other than 200, all in OpenAI's shape; none repeats what was sent."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from zsaa.serve.guard import shaped

UNKNOWN = "this server does not know this field. Leave it out"
NEUTRAL = "this server knows one value of this field, which changes nothing"


class Refused(Exception):
    """An answer other than 200: status, content as `shaped` makes it, headers."""

    def __init__(self, status: int, message: str, headers: dict | None = None, **facts):
        self.status, self.content, self.headers = status, shaped(status, message, **facts), headers


class Gone(Exception):
    """The client has left; nobody will read the answer."""


def answer_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse(error.content, error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = next((part for part in first["loc"] if isinstance(part, str)), "")
        known = where if len(where) < 64 and where.replace("_", "").isalnum() else None
        said = {"extra_forbidden": UNKNOWN, "none_required": NEUTRAL}.get(first["type"], first["msg"])
        return JSONResponse(shaped(400, f"{known or 'the body'}: {said}.", param=known), 400)

    @app.exception_handler(Gone)
    async def gone(request: Request, error: Gone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(shaped(error.status_code, str(error.detail)), error.status_code, headers=error.headers)
