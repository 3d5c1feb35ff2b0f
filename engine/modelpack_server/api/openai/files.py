"""The routes below /v1/files: upload, list, read and delete files (`stored_files`)."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from modelpack_engine.errors import RequestError
from modelpack_server.api.errors import ClientGoneError
from modelpack_server.api.openai.requests import Order
from modelpack_server.api.openai.stored_files import (
    KEPT_FOR,
    LONGEST,
    MAX_FILE_BYTES,
    SHORTEST,
    StoredFile,
    StoredFiles,
    Upload,
    page,
)
from modelpack_server.api.paths import add_route
from modelpack_server.gateway.bodies import SLOW_START, SLOWEST_RATE
from modelpack_server.gateway.caller import caller_of
from modelpack_server.gateway.forms import Form, FormError

#: The purposes of uploads. Only files of the purpose `batch` are used, as the input of batches.
PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")

_FRAME = 64 * 1024  # bytes of a form without its file
_PIECE = 1024 * 1024  # bytes of an upload that are collected before a thread writes them
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"enum": list(PURPOSES)},
                        "expires_after[anchor]": {"const": "created_at"},
                        "expires_after[seconds]": {"type": "integer"},
                    },
                }
            }
        },
    }
}


def router(files: StoredFiles) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"])

    async def upload_file(request: Request) -> dict[str, Any]:
        """Store a file; `purpose` says what it is for, `expires_after` when it is deleted."""
        owner = caller_of(request.scope).owner
        upload = await asyncio.to_thread(files.upload, owner)
        try:
            form = Form(request.headers.get("content-type", ""))
            await _receive(request, form, upload)
            purpose, seconds = _checked(dict(form.fields))
            filename = form.filename
            if filename is None:
                raise RequestError("file is required", param="file")
            stored = await asyncio.to_thread(
                upload.finish, purpose=purpose, filename=filename, seconds=seconds
            )
            return stored.json()
        except FormError as error:
            raise RequestError(str(error), param=error.param) from None
        except ClientDisconnect:
            raise ClientGoneError("the client disconnected") from None
        finally:
            await asyncio.to_thread(upload.close)

    async def list_files(
        request: Request,
        purpose: str | None = None,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Order = "desc",
    ) -> dict[str, Any]:
        """List the files of the API key."""
        owner = caller_of(request.scope).owner
        found = await asyncio.to_thread(files.list, owner, purpose)
        return page(found if order == "asc" else reversed(found), after, limit)

    async def find(request: Request, file_id: str) -> StoredFile:
        return await asyncio.to_thread(files.find, caller_of(request.scope).owner, file_id)

    async def retrieve_file(file_id: str, request: Request) -> dict[str, Any]:
        """Return the attributes of a file."""
        return (await find(request, file_id)).json()

    async def download_file(file_id: str, request: Request) -> Response:
        """Return the bytes of a file."""
        file = await find(request, file_id)
        return FileResponse(
            files.path(file), media_type="application/octet-stream", filename=file.filename
        )

    async def delete_file(file_id: str, request: Request) -> dict[str, Any]:
        """Delete a file; a batch that was created from it continues."""
        await asyncio.to_thread(files.remove, caller_of(request.scope).owner, file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    add_route(routes, "/files", upload_file, extra=_FORM)
    add_route(routes, "/files", list_files, methods=["GET"])
    add_route(routes, "/files/{file_id}", retrieve_file, methods=["GET"])
    add_route(routes, "/files/{file_id}", delete_file, methods=["DELETE"])
    add_route(routes, "/files/{file_id}/content", download_file, methods=["GET"])
    return routes


async def _receive(request: Request, form: Form, upload: Upload) -> None:
    """Write the file of a form to `upload`, within its limits."""
    size, began = 0, time.monotonic()
    async with aclosing(request.stream()) as pieces:
        while True:
            patience = SLOW_START + size / SLOWEST_RATE - (time.monotonic() - began)
            try:
                piece = await asyncio.wait_for(anext(pieces, None), patience)
            except TimeoutError:
                raise HTTPException(408, "the file arrived too slowly") from None
            if piece is None:
                break
            form.feed(piece)
            size += len(piece)
            if form.size > MAX_FILE_BYTES or size > MAX_FILE_BYTES + _FRAME:
                raise HTTPException(413, f"the file exceeds {MAX_FILE_BYTES} bytes")
            if len(form.content) >= _PIECE:
                await asyncio.to_thread(upload.write, form.take())
    form.end()
    await asyncio.to_thread(upload.write, form.take())


def _checked(fields: dict[str, str]) -> tuple[str, float]:
    """Return the purpose of an upload, and the seconds for which the file is kept."""
    purpose = fields.get("purpose")
    if purpose not in PURPOSES:
        given = "missing" if purpose is None else repr(purpose[:100])
        raise RequestError(
            f"purpose is {given}, expected one of {', '.join(PURPOSES)}", param="purpose"
        )
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return purpose, KEPT_FOR
    return purpose, expiry(anchor, seconds)


def expiry(anchor: object, seconds: object, param: str = "expires_after") -> float:
    """Return the seconds of an expiration policy; raises `RequestError`."""
    if anchor != "created_at":
        raise RequestError("anchor: expected created_at", param=f"{param}.anchor")
    text = str(seconds)
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if not SHORTEST <= number <= LONGEST:
        raise RequestError(
            f"seconds is {text[:100]}, expected {SHORTEST} to {LONGEST}", param=f"{param}.seconds"
        )
    return number
