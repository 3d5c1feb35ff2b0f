"""The routes below /models: list, pull, push, load from an archive, tag and delete."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import modelpack
from modelpack.artifacts.reference import Reference
from modelpack.errors import (
    FormatError,
    IntegrityError,
    InterruptedTransferError,
    NotFoundError,
    UnsupportedError,
    UsageError,
)
from modelpack.operations.archives import archive_of, import_archive
from modelpack.operations.lookup import inspect
from modelpack.storage import watching
from modelpack_engine.errors import RequestError
from modelpack_server.api.bodies import Body
from modelpack_server.api.model_runner.answers import TextRoute, documented, read_body
from modelpack_server.api.model_runner.names import (
    find_stored,
    listed,
    model_object,
    name_shown,
    stored_object,
)
from modelpack_server.api.model_runner.progress import Lines, TransferRequest, Transfers, stoppable
from modelpack_server.pool.pool import ModelPool


class BodyFile(io.RawIOBase):
    """The body of `request` as a file for another thread; create it on the event loop.

    Reading raises `InterruptedTransferError` if the client disconnects before the end.
    """

    def __init__(self, request: Request) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._pieces: AsyncIterator[bytes] = request.stream().__aiter__()
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Wait for bytes, copy them into `buffer` and return their number, 0 at the end."""
        while not self._rest:
            piece = asyncio.run_coroutine_threadsafe(self._next(), self._loop).result()
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    async def _next(self) -> bytes | None:
        try:
            return await anext(self._pieces, None)
        except ClientDisconnect as error:
            raise InterruptedTransferError(
                "the client disconnected before the end of the body"
            ) from error


# A query parameter without a value counts as true.
Flag = Annotated[str, Query()]


class RepackageRequest(Body):
    """The body of POST /models/{ref}/repackage; `context_size` is in tokens."""

    target: str = ""
    context_size: Annotated[int, Field(ge=0, lt=2**31)] | None = None


def router(pool: ModelPool) -> APIRouter:
    routes = APIRouter(tags=["Docker Model Runner"], route_class=TextRoute)
    transfers = Transfers(pool)

    @routes.post("/models/create", response_model=None, openapi_extra=documented(TransferRequest))
    async def create(request: Request) -> Response:
        """Pull the model named by `from`; the reply is a stream of progress lines."""
        return await transfers.pull(request, await read_body(request, TransferRequest))

    @routes.post("/models/load", response_model=None, openapi_extra=_TAR)
    async def load(request: Request) -> Response:
        """Store the model from a tar archive: of `docker model package`, or an OCI layout."""
        store, stop = pool.catalogue.store, modelpack.Stop()
        body = io.BufferedReader(BodyFile(request))
        try:
            await asyncio.to_thread(import_archive, store, body, watching(None, stop))
        except UnsupportedError:
            raise
        except (FormatError, IntegrityError) as error:  # the archive is invalid, not the store
            raise RequestError(str(error), param="archive") from error
        lines = Lines.asked_by(request, "pull")
        return Response(lines.success("Model loaded successfully"), media_type=lines.media_type)

    @routes.get("/models")
    async def list_models() -> list[dict[str, Any]]:
        """List the models of the store."""
        seen = {model.key: model.names for model in await pool.stored()}
        return await asyncio.to_thread(listed, pool.catalogue.store, seen)

    @routes.get("/models/{ref:path}", response_model=None)
    async def get_model(ref: str, request: Request, remote: Flag = "false") -> Response:
        """Return a model, with `remote` the one in its registry. A path that ends in `/export`
        returns all files as a tar archive.
        """
        name, slash, action = ref.rpartition("/")
        if slash and action == "export":
            return await export(name)
        store = pool.catalogue.store
        if _is_set(remote):
            found = await stoppable(
                request, lambda stop: inspect(ref, from_registry=True, stop=stop)
            )
            return JSONResponse(model_object(found))
        return JSONResponse(await asyncio.to_thread(stored_object, store, ref))

    async def export(ref: str) -> Response:
        store = pool.catalogue.store
        name, _ = await asyncio.to_thread(find_stored, store, ref)
        watch = watching(None)
        archive = await asyncio.to_thread(archive_of, store, [name], watch, form="docker")
        quoted = ref.replace("\\", "\\\\").replace('"', '\\"')
        headers = {
            "Content-Length": str(archive.size),
            "Content-Disposition": f'attachment; filename="{quoted}.tar"',
        }
        return StreamingResponse(archive.pieces, media_type="application/x-tar", headers=headers)

    @routes.delete("/models/purge", response_model=None)
    async def purge() -> Response:
        """Remove all models."""
        await pool.unload(idle_only=True)
        await asyncio.to_thread(_remove_all, pool)
        return Response()

    @routes.delete("/models/{ref:path}")
    async def delete_model(ref: str, force: Flag = "false") -> list[dict[str, str]]:
        """Remove a name of a model. Its last name, or its id, removes the model.

        409 for the id of a model with several names, unless `force` is set.
        """
        store = pool.catalogue.store
        name, model = await asyncio.to_thread(find_stored, store, ref)
        if len(model.references) < 2 or _is_set(force):
            await pool.unload([str(model.digest)], idle_only=True)
        removal = await asyncio.to_thread(store.remove, name, force=_is_set(force))
        done = [{"Untagged": name_shown(untagged)} for untagged in removal.untagged]
        return done + [{"Deleted": str(digest)} for digest in removal.deleted[:1]]

    @routes.post("/models/{ref:path}/tag", response_model=None, status_code=201)
    async def tag(
        ref: str, repo: Annotated[str, Query()] = "", tag: Annotated[str, Query()] = ""
    ) -> Response:
        """Give a model the additional name `repo`:`tag`."""
        if not repo or not tag:
            raise UsageError("missing repo or tag query parameter")
        target = Reference.parse(f"{repo}:{tag}")
        store = pool.catalogue.store
        name, _ = await asyncio.to_thread(find_stored, store, ref)
        await asyncio.to_thread(store.tag, name, target)
        said = {
            "message": f'Model tagged successfully with "{repo}:{tag}"',
            "target": f"{repo}:{tag}",
        }
        return JSONResponse(said, 201)

    @routes.post("/models/{ref:path}/push", response_model=None,
                 openapi_extra=documented(TransferRequest, required=False))  # fmt: skip
    async def push(ref: str, request: Request) -> Response:
        """Push a model to the registry in its name; the reply is a stream of progress lines."""
        return await transfers.push(request, ref, await read_body(request, TransferRequest))

    @routes.post("/models/{ref:path}/repackage", response_model=None, status_code=201,
                 openapi_extra=documented(RepackageRequest))  # fmt: skip
    async def repackage(ref: str, request: Request) -> Response:
        """Create a model with the same files and another context size."""
        body = await read_body(request, RepackageRequest)
        if not body.target:
            raise UsageError("target is required")
        store = pool.catalogue.store
        _, model = await asyncio.to_thread(find_stored, store, ref)
        await asyncio.to_thread(
            modelpack.package,
            body.target,
            modelpack.PackageRequest(context_size=body.context_size),
            from_model=str(model.digest),
            store=store,
            remote=pool.catalogue.remote,
        )
        said = {
            "message": f'Model repackaged successfully as "{body.target}"',
            "source": ref,
            "target": body.target,
        }
        return JSONResponse(said, 201)

    @routes.post("/models/{ref:path}", include_in_schema=False, response_model=None)
    async def unknown_action(ref: str) -> Response:
        raise HTTPException(404, f'unknown action "{ref.rpartition("/")[2]}"')

    return routes


_TAR = {
    "requestBody": {
        "required": True,
        "content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def _is_set(flag: str) -> bool:
    return flag.lower() in ("", "1", "t", "true")


def _remove_all(pool: ModelPool) -> None:
    store = pool.catalogue.store
    for model in store.models():
        try:
            store.remove(str(model.digest), force=True)
        except NotFoundError:
            continue  # another request removed it first
