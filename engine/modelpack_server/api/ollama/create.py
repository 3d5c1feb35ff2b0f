"""The routes POST /api/create, and HEAD and POST /api/blobs/{digest} for the files that it uses.

A model is created from another model or from uploaded files. It is packaged anew: the template and
the licenses are layers, the rest is an annotation of the manifest
(`modelpack_server.pool.model_defaults`). The weights are neither copied nor changed.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fastapi import APIRouter, Request, Response

from modelpack.artifacts.digest import Digest, new_hasher
from modelpack.artifacts.model import Model, Role
from modelpack.artifacts.paths import checked_path
from modelpack.artifacts.reference import Reference
from modelpack.builder.request import PackageRequest
from modelpack.errors import DigestMismatchError, InvalidDigestError, UnsafePathError
from modelpack.operations.package import package, scratch_directory
from modelpack.operations.pull import find_model
from modelpack.operations.remote import RemoteOptions
from modelpack.progress import ProgressCallback, Stop
from modelpack.storage import watching
from modelpack.store.filesystem import map_os_errors
from modelpack.store.layout import LayoutStore
from modelpack.store.tree import Tree
from modelpack_engine.errors import RequestError
from modelpack_engine.models.chat_template import as_jinja, check_template
from modelpack_engine.worker.threads import in_thread
from modelpack_server.api.ollama.bodies import CreateBody, check_request_template
from modelpack_server.api.ollama.chat import template_messages
from modelpack_server.api.ollama.jobs import Job, Steps, tell
from modelpack_server.api.ollama.models import shown_template
from modelpack_server.api.ollama.ndjson import JsonRoute
from modelpack_server.pool.model_defaults import KNOWN, ModelDefaults, parse_options
from modelpack_server.pool.pool import ModelPool

# The bytes of an upload that are collected before a thread writes them.
_PIECE = 1024 * 1024


def _blob_routes(pool: ModelPool) -> APIRouter:
    """Return the routes for uploads."""
    routes = APIRouter(tags=["Ollama"])

    @routes.head("/api/blobs/{digest}", response_model=None)
    async def has_blob(digest: str) -> Response:
        """Return 200 if the store has a blob, else 404."""
        there = await asyncio.to_thread(pool.catalogue.store.touch_blob, _blob_digest(digest))
        return Response(status_code=200 if there else 404)

    @routes.post("/api/blobs/{digest}", response_model=None)
    async def take_blob(digest: str, request: Request) -> Response:
        """Store the body as a blob; 400 if it does not match its digest."""
        wanted, store = _blob_digest(digest), pool.catalogue.store
        if await asyncio.to_thread(store.touch_blob, wanted):
            return Response(status_code=200)
        try:
            await _receive(request, store, wanted)
        except DigestMismatchError as error:
            raise RequestError(str(error), param="digest") from error
        return Response(status_code=201)

    return routes


def _digest(text: str, param: str) -> Digest:
    try:
        return Digest.parse(text.replace("-", ":", 1))  # Ollama accepts sha256-HEX too
    except InvalidDigestError as error:
        raise RequestError(str(error), param=param) from error


def _blob_digest(text: str) -> Digest:
    digest = _digest(text, "digest")
    if digest.algorithm != "sha256":
        raise RequestError(f"{text} is not a sha256 digest", param="digest")
    return digest


async def _receive(request: Request, store: LayoutStore, wanted: Digest) -> None:
    """Write the body to a file in the store, and add it as a blob if it matches its digest."""
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


_STEPS = Steps("gathering model components", "pulling", ("writing manifest",))
_TEMPLATE = "chat_template.jinja"


def router(pool: ModelPool, *, request_templates: bool = False) -> APIRouter:
    """Return the routes; `request_templates` lets admins send templates."""
    routes = APIRouter(tags=["Ollama"], route_class=JsonRoute)

    @routes.post("/api/create", response_model=None)
    async def create(body: CreateBody, request: Request) -> Response:
        """Create a model from another model or from files, with parameters or a template."""
        body.template = await _requested_template(pool, body, request, request_templates)
        recipe = recipe_of(body)

        def work(report: ProgressCallback, stop: Stop) -> None:
            make(pool.catalogue.store, recipe, report, stop, remote=pool.catalogue.remote)

        job = Job(work, lambda ended: None)
        return await tell(request, job, _STEPS, stream=body.stream)

    routes.routes.extend(_blob_routes(pool).routes)
    return routes


async def _requested_template(
    pool: ModelPool, body: CreateBody, request: Request, allowed: bool
) -> str:
    """Return the template of a request as Jinja, or "" to keep the base model's template.

    Raises `DeniedError` if the client may not send templates, `RequestError` for a template that
    does not compile.
    """
    if not body.template or (body.base and body.template == await shown_template(pool, body.base)):
        return ""
    check_request_template(request, allowed=allowed)
    made = await in_thread(as_jinja, body.template)
    await in_thread(check_template, made)
    return made


@dataclass(frozen=True, slots=True)
class Recipe:
    """The model to create; either `base` or `files` is set."""

    target: Reference
    base: str
    files: Mapping[str, Digest]
    template: str
    licenses: tuple[str, ...]
    defaults: ModelDefaults
    context_size: int | None
    quantize: str


def recipe_of(body: CreateBody) -> Recipe:
    """Return the recipe of a request; raises `RequestError` for unsupported fields."""
    refused = {
        "modelfile": (body.modelfile, "send its parts as the fields from, template and parameters"),
        "adapters": (body.adapters, "merge the adapter into the weights first"),
    }
    for name, (value, hint) in refused.items():
        if value:
            raise RequestError(f"{name} is not supported", param=name, hint=hint)
    if bool(body.base) == bool(body.files):
        raise RequestError("expected one of 'from' and 'files'", param="from")
    unknown = sorted(set(body.parameters) - KNOWN)
    if unknown:
        raise RequestError(f"unknown parameter {unknown[0]!r}", param="parameters")
    given = {name: value for name, value in body.parameters.items() if value is not None}
    options = parse_options(given)
    licenses = [body.license] if isinstance(body.license, str) else body.license
    return Recipe(
        Reference.parse(body.model),
        body.base,
        {_safe(name): _digest(text, "files") for name, text in body.files.items()},
        body.template,
        tuple(text for text in licenses if text),
        ModelDefaults(given, body.system, tuple(template_messages(body.messages, body.model))),
        options.context_size,
        body.quantize,
    )


def make(
    store: LayoutStore, recipe: Recipe, report: ProgressCallback, stop: Stop,
    *, remote: RemoteOptions,
) -> None:  # fmt: skip
    """Create a model, and pull its base model if the store lacks it.

    If `remote` has a trust policy, the base model must be signed accordingly. Raises what
    `modelpack.package` and `modelpack.pull` raise.
    """
    base: Model | None = None
    if recipe.base:
        watch = watching(report, stop)
        base = find_model(recipe.base, store, pull=True, remote=remote, watch=watch)
    _check_quantization(recipe.quantize, base)
    before = ModelDefaults.of_model(base, store) if base else ModelDefaults()
    defaults = ModelDefaults(
        {**before.parameters, **recipe.defaults.parameters},
        recipe.defaults.system or before.system,
        recipe.defaults.messages or before.messages,
    )
    with scratch_directory(store, "create") as directory:
        request = PackageRequest()
        if recipe.files:
            request = _lay_out(store, recipe.files, directory / "files")
        request = replace(
            request,
            licenses=_licenses(recipe.licenses, directory),
            chat_template=_template(recipe.template, base, directory),
            context_size=recipe.context_size,
            annotations=defaults.annotation(),
        )
        package(
            recipe.target, request, from_model=str(base.digest) if base else None,
            store=store, remote=remote, progress=report, stop=stop,
        )  # fmt: skip


def _check_quantization(wanted: str, base: Model | None) -> None:
    has = base.config.quantization.removeprefix("MOSTLY_") if base else ""
    if wanted and wanted.upper() != has.upper():
        raise RequestError(
            f"cannot quantize to {wanted}: weights are served as they are",
            param="quantize",
            hint=f"the model is {has}" if has else "quantize the weights first",
        )


def _lay_out(store: LayoutStore, files: Mapping[str, Digest], directory: Path) -> PackageRequest:
    """Link uploaded files into `directory` by name, and return the request that packages them."""
    for name, digest in files.items():
        if not store.touch_blob(digest):
            raise RequestError(
                f"no such blob: {digest} (for {name})",
                param="files",
                hint="upload it to /api/blobs first",
            )
        path = directory / name
        with map_os_errors("link", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(store.blob_path(digest), path)
    names = sorted(files)
    if all(name.lower().endswith(".gguf") for name in names):
        return PackageRequest(gguf=directory / names[0])
    return PackageRequest(safetensors_dir=directory)


def _licenses(texts: tuple[str, ...], directory: Path) -> tuple[Path, ...]:
    paths = []
    for raw in map(str.encode, texts):
        paths.append(directory / f"LICENSE-{Digest.of(raw).short}")
        paths[-1].write_bytes(raw)
    return tuple(paths)


def _template(text: str, base: Model | None, directory: Path) -> Path | None:
    """Write a template under the file name of the base model's template."""
    if not text:
        return None
    files = base.files() if base else ()
    old = [file.filepath for file in files if file.role is Role.CHAT_TEMPLATE]
    name = (old[0] if old else None) or _TEMPLATE
    path = directory / name.rpartition("/")[2]
    path.write_text(text, encoding="utf-8")
    return path


def _safe(name: str) -> str:
    try:
        return checked_path(name.removeprefix("./"))
    except UnsafePathError as error:
        raise RequestError(str(error), param="files") from error
