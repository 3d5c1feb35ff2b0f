"""The routes HEAD and POST /api/blobs/{digest}: uploads of files for `/api/create`."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

from fastapi import APIRouter, Request, Response

from modelpack.artifacts.digest import Digest, new_hasher
from modelpack.errors import DigestMismatchError, InvalidDigestError
from modelpack.store.filesystem import map_os_errors
from modelpack.store.layout import LayoutStore
from modelpack.store.tree import Tree
from modelpack_engine.errors import RequestError
from modelpack_server.pool.pool import ModelPool

# Bytes that are gathered before a thread is asked to write them.
_PIECE = 1024 * 1024


def router(pool: ModelPool) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["Ollama"])

    @routes.head("/api/blobs/{digest}", response_model=None)
    async def has_blob(digest: str) -> Response:
        """Say whether the store has a blob: 200, or 404."""
        there = await asyncio.to_thread(pool.catalogue.store.touch_blob, _digest(digest))
        return Response(status_code=200 if there else 404)

    @routes.post("/api/blobs/{digest}", response_model=None)
    async def take_blob(digest: str, request: Request) -> Response:
        """Take a blob, the body as it is; 400 if it is another than its digest says."""
        wanted, store = _digest(digest), pool.catalogue.store
        if await asyncio.to_thread(store.touch_blob, wanted):
            return Response(status_code=200)
        try:
            await _receive(request, store, wanted)
        except DigestMismatchError as error:
            raise RequestError(str(error), param="digest") from error
        return Response(status_code=201)

    return routes


def _digest(text: str) -> Digest:
    try:
        digest = Digest.parse(text.replace("-", ":", 1))  # Ollama takes both
    except InvalidDigestError as error:
        raise RequestError(str(error), param="digest") from error
    if digest.algorithm != "sha256":
        raise RequestError(f"{text} is not a sha256 digest", param="digest")
    return digest


async def _receive(request: Request, store: LayoutStore, wanted: Digest) -> None:
    """Write the body to a file of the store's, and make it a blob if it is the right one."""
    path = await asyncio.to_thread(_new_file, store)
    hasher = new_hasher()

    def write(content: bytes) -> None:
        hasher.update(content)
        with map_os_errors("write", path), path.open("ab") as file:
            file.write(content)

    try:
        gathered = bytearray()
        async for chunk in request.stream():
            gathered += chunk
            if len(gathered) >= _PIECE:
                await asyncio.to_thread(write, bytes(gathered))
                gathered.clear()
        await asyncio.to_thread(write, bytes(gathered))
        wanted.check_equal(Digest.of_hasher(hasher), "the upload")
        await asyncio.to_thread(store.take_file, path, wanted)
    finally:
        await asyncio.to_thread(path.unlink, missing_ok=True)


def _new_file(store: LayoutStore) -> Path:
    directory = Tree(store.root).uploads
    path = directory / f"ollama-{uuid.uuid4().hex}"
    with map_os_errors("make", directory):
        directory.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    return path
