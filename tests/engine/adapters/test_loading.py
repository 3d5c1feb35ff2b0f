"""LoRA adapters that requests load and unload while a server runs."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

import modelpack
from modelpack.builder.request import PackageRequest
from modelpack.errors import NotFoundError
from modelpack.operations import signatures
from modelpack.operations.adapters import package_adapter
from modelpack.operations.remote import RemoteOptions
from modelpack.registry import RetryPolicy
from modelpack.store.layout import LayoutStore
from modelpack.trust.keys import generate_key_pair, read_private_key
from modelpack.trust.policy import Trust
from modelpack_engine.async_engine import AsyncEngine
from modelpack_engine.config import EngineConfig
from modelpack_engine.cpu.library import library
from modelpack_engine.engine import Engine
from modelpack_engine.errors import BusyError, OutOfMemoryError, QueueFullError, RequestError
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_engine.runner.cpu import CpuRunner
from modelpack_server.api.app import ModelServer, create_app
from modelpack_server.cli.model_sources import ModelSources
from modelpack_server.gateway import KeyFile, Protection, add_key, protect
from modelpack_server.pool.pool import ModelPool
from tests.adapters import write_peft
from tests.cli.running import modelpack as run
from tests.cli.running import succeed
from tests.engine.adapters.test_server import BASE, CONFIG, ONE, PROMPT, TWO, World
from tests.engine.adapters.test_server import remote_adapter as remote_adapter
from tests.engine.adapters.test_server import world as world
from tests.engine.adapters.test_zoo import linears
from tests.engine.pool.test_pool import loop
from tests.engine.serving.tiny import tiny_model, tiny_tokenizer, write_tiny

IDS = tiny_tokenizer()._backend.encode(PROMPT).ids


ON_MLX = replace(CONFIG, backend="mlx")


def loading_pool(
    sources: ModelSources,
    *directories: Path,
    memory: int | None = None,
    model: str = BASE,
    config: EngineConfig = ON_MLX,
) -> ModelPool:
    """Return a pool with one MODEL whose requests may load adapters."""
    sources.adapters.grows = True
    pool = ModelPool(
        sources.catalogue(config), memory=memory,
        adapter_loading=sources.adapter_loading(directories),
    )  # fmt: skip
    pool.pin(sources.open(model).name)
    return pool


@contextmanager
def served(world: World, *directories: Path) -> Iterator[tuple[TestClient, ModelPool]]:
    with world.sources() as sources:
        pool = loading_pool(sources, *directories)
        with TestClient(create_app(pool), raise_server_exceptions=False) as http:
            yield http, pool


def load(http: TestClient, name: str, path: str) -> httpx.Response:
    body = {"lora_name": name, "lora_path": path}
    reply: httpx.Response = http.post("/v1/load_lora_adapter", json=body)
    return reply


def unload(http: TestClient, name: str) -> httpx.Response:
    reply: httpx.Response = http.post("/v1/unload_lora_adapter", json={"lora_name": name})
    return reply


def complete(http: TestClient, model: str) -> httpx.Response:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12}
    reply: httpx.Response = http.post("/v1/completions", json=body)
    return reply


def engine_of(pool: ModelPool) -> Engine:
    [entry] = [entry for entry in pool._entries.values() if entry.engine is not None]
    assert isinstance(entry.engine, AsyncEngine)
    engine = entry.engine._model
    assert isinstance(engine, Engine)
    return engine


@pytest.mark.long
def test_load_and_unload(world: World) -> None:
    """vLLM's responses; requests find the adapter as long as it is loaded."""
    expected = {name: world.expected(name, IDS) for name in (None, ONE, TWO)}
    with served(world, world.directory) as (http, pool):
        assert complete(http, BASE).json()["choices"][0]["text"] == expected[None]
        [entry] = pool.entries()
        before = entry.memory, engine_of(pool).memory_bytes
        for _ in range(2):
            reply = load(http, "first", ONE)
            assert (reply.status_code, reply.text) == (
                200, "Success: LoRA adapter 'first' added successfully.",
            )  # fmt: skip
            assert load(http, "second", str(world.directory)).status_code == 200
            assert entry.memory > before[0]
            listed = {one["id"]: one for one in http.get("/v1/models").json()["data"]}
            assert listed["first"]["parent"] == listed["second"]["parent"] == BASE
            for name, adapter in (("first", ONE), ("second", TWO), (f"{BASE}:first", ONE)):
                assert complete(http, name).json()["choices"][0]["text"] == expected[adapter]
            again = load(http, "first", TWO)
            assert again.status_code == 400
            error = again.json()["error"]
            assert error["message"] == "The lora adapter 'first' has already been loaded."
            assert error["param"] == "lora_name"
            for name in ("first", "second"):
                reply = unload(http, name)
                assert (reply.status_code, reply.text) == (
                    200, f"Success: LoRA adapter '{name}' removed successfully.",
                )  # fmt: skip
                assert complete(http, name).status_code == 404
                assert complete(http, f"{BASE}:{name}").status_code == 404
                gone = unload(http, name)
                assert gone.status_code == 404
                assert f"The lora adapter '{name}' cannot be found." in gone.text
            ids = {one["id"] for one in http.get("/v1/models").json()["data"]}
            assert not {"first", "second", "adapter:second"} & ids
            assert (entry.memory, engine_of(pool).memory_bytes) == before
        assert (world.directory / "adapter_model.safetensors").is_file()


def test_an_adapter_named_at_start_can_be_unloaded(world: World) -> None:
    with world.sources() as sources:
        pool = loading_pool(sources)
        sources.add_adapter("one", ONE, [sources.open(BASE)])
        with TestClient(create_app(pool)) as http:
            assert complete(http, "one").status_code == 200
            assert unload(http, "one").status_code == 200
            assert complete(http, "one").status_code == 404
            assert load(http, "one", TWO).status_code == 200
            text = complete(http, "one").json()["choices"][0]["text"]
            assert text == world.expected(TWO, IDS)


def test_requests_end_with_the_adapter_that_is_unloaded_meanwhile(world: World) -> None:
    @loop
    async def check() -> None:
        with world.sources() as sources:
            pool = loading_pool(sources)
            await pool.load_adapter("one", ONE)
            empty = engine_of(pool).memory_bytes - engine_of(pool)._adapters.nbytes  # type: ignore[union-attr]
            params = SamplingParams(temperature=0.0, max_tokens=12)
            async with pool.lease("one") as model:
                request = EngineRequest(IDS, params, continues_text=True)
                stream = await model.submit(request)
                await pool.unload_adapter("one")
                with pytest.raises(NotFoundError, match="no such model"):
                    await pool.find("one")
                with pytest.raises(NotFoundError, match="no such adapter"):
                    await model.submit(request)
                await pool.load_adapter("one", TWO)
                ids = [token async for event in stream for token in event.token_ids]
            assert tiny_tokenizer()._backend.decode(ids) == world.expected(ONE, IDS)
            await pool.unload_adapter("one")
            assert engine_of(pool).memory_bytes == empty
            await pool.close()

    check()


@pytest.mark.sample(1)
@pytest.mark.parametrize("seed", range(3))
def test_loads_and_unloads_under_traffic(world: World, seed: int) -> None:
    """Every reply is that of the adapter or an error; at the end, no memory is counted for any."""
    expected = {ref: world.expected(ref, IDS) for ref in (None, ONE, TWO)}
    refs = {"a": ONE, "b": TWO, "c": ONE, BASE: None}
    draw = random.Random(seed)

    @loop
    async def check() -> None:
        with world.sources() as sources:
            pool = loading_pool(sources)
            async with pool.lease(BASE):
                [entry] = pool.entries()
                before = entry.memory, engine_of(pool).memory_bytes
            texts: list[tuple[str, str]] = []
            errors: list[str] = []

            async def change() -> None:
                for _ in range(12):
                    name = draw.choice("abc")
                    try:
                        if draw.random() < 0.6:
                            await pool.load_adapter(name, str(refs[name]))
                        else:
                            await pool.unload_adapter(name)
                    except (RequestError, NotFoundError, BusyError) as error:
                        errors.append(str(error))
                    await asyncio.sleep(0)

            async def ask() -> None:
                for _ in range(8):
                    name = draw.choice(["a", "b", "c", BASE])
                    params = SamplingParams(temperature=0.0, max_tokens=12)
                    request = EngineRequest(IDS, params, continues_text=True)
                    try:
                        async with pool.lease(name) as model:
                            stream = await model.submit(request)
                            ids = [token async for event in stream for token in event.token_ids]
                    except (NotFoundError, QueueFullError):
                        await asyncio.sleep(0)
                        continue
                    texts.append((name, tiny_tokenizer()._backend.decode(ids)))

            await asyncio.gather(*(change() for _ in range(2)), *(ask() for _ in range(4)))
            assert texts
            words = ("already been loaded", "cannot be found", "is being loaded or unloaded")
            assert all(any(word in error for word in words) for error in errors)
            for name, text in texts:
                assert text == expected[refs[name]]
            for name in "abc":
                if sources.adapters.named(name) is not None:
                    await pool.unload_adapter(name)
            assert (entry.memory, engine_of(pool).memory_bytes) == before
            await pool.close()

    check()


def test_the_base_loads_again_without_an_adapter_that_is_gone(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Unlike one that is named at start, it does not keep its base from loading."""
    path = write_peft(tmp_path / "three", linears(tiny_model()), seed=3, size=0.3)
    with served(world, tmp_path) as (http, _):
        assert load(http, "three", str(path)).status_code == 200
        assert load(http, "one", ONE).status_code == 200
        (path / "adapter_model.safetensors").unlink()
        assert http.post("/pool/unload", json={"models": [BASE]}).status_code == 200
        assert complete(http, BASE).status_code == 200
        assert complete(http, "three").status_code == 404
        assert complete(http, "one").json()["choices"][0]["text"] == world.expected(ONE, IDS)
    assert "the adapter three is unloaded: " in caplog.text


def test_adapters_share_no_prefixes(world: World) -> None:
    """A prompt is found in the cache under the same content only, whatever name it has."""
    prompt = (PROMPT + " ") * 8

    def ask(http: TestClient, model: str) -> tuple[int, str]:
        body = {"model": model, "prompt": prompt, "max_tokens": 8}
        reply = http.post("/v1/completions", json=body).json()
        return reply["usage"]["prompt_tokens_details"]["cached_tokens"], reply["choices"][0]["text"]

    with served(world) as (http, _):
        for name, ref in (("a", ONE), ("b", TWO), ("same", ONE)):
            assert load(http, name, ref).status_code == 200
        first = {name: ask(http, name) for name in (BASE, "a", "b")}
        assert {cached for cached, _ in first.values()} == {0}
        assert len({text for _, text in first.values()}) == 3
        for name in (BASE, "a", "b", "same"):
            cached, text = ask(http, name)
            assert cached >= 16
            assert text == first["a" if name == "same" else name][1]
        assert unload(http, "a").status_code == 200
        assert load(http, "a", TWO).status_code == 200
        assert ask(http, "a")[1] == first["b"][1]


@pytest.mark.skipif(library() is None, reason="the library for CPUs is not built")
def test_a_model_leaves_the_library_for_cpus_for_its_first_adapter(
    world: World, tmp_path: Path
) -> None:
    """It is loaded again, and requests wait; other models stay in the library."""

    @loop
    async def check() -> None:
        with world.sources() as sources:
            pool = loading_pool(sources, config=CONFIG)
            params = SamplingParams(temperature=0.0, max_tokens=12)
            request = EngineRequest(IDS, params, continues_text=True)

            async def ask(name: str) -> str:
                async with pool.lease(name) as model:
                    stream = await model.submit(request)
                    ids = [token async for event in stream for token in event.token_ids]
                return tiny_tokenizer()._backend.decode(ids)

            base = world.expected(None, IDS)
            assert await ask(BASE) == base
            assert isinstance(engine_of(pool)._runner, CpuRunner)
            with pytest.raises(NotFoundError):
                await pool.load_adapter("one", "/nowhere")
            assert isinstance(engine_of(pool)._runner, CpuRunner)
            texts, *_ = await asyncio.gather(
                asyncio.gather(*(ask(BASE) for _ in range(4))),
                pool.load_adapter("one", ONE),
                pool.load_adapter("two", TWO),
            )
            assert texts == [base] * 4
            assert engine_of(pool).config.max_loras > 0
            assert await ask("one") == world.expected(ONE, IDS)
            assert await ask("two") == world.expected(TWO, IDS)
            for name in ("one", "two"):
                await pool.unload_adapter(name)
            await pool.unload()
            assert await ask(BASE) == base
            assert isinstance(engine_of(pool)._runner, CpuRunner)
            await pool.close()

    check()


def test_memory_for_adapters(world: World) -> None:
    """An adapter that does not fit into the budget is refused, and its name stays free."""

    @loop
    async def check() -> None:
        with world.sources() as sources:
            pool = loading_pool(sources, memory=2**30)
            async with pool.lease(BASE):
                [entry] = pool.entries()
            pool._budget.total = entry.memory
            for _ in range(2):
                with pytest.raises(OutOfMemoryError, match="the adapter needs about"):
                    await pool.load_adapter("one", ONE)
            assert pool._budget.free() == 0
            pool._budget.total = 2**30
            await pool.load_adapter("one", ONE)
            assert pool._budget.free() == 2**30 - entry.memory
            await pool.close()

    check()


#: NAME, lora_path, the status and a part of the error. {d} is the allowed directory.
REFUSED = {
    "outside": ("x", "{outside}", 404, "no such directory, or not allowed"),
    "missing": ("x", "{d}/nowhere", 404, "no such directory, or not allowed"),
    "climbs out": ("x", "{d}/../outside", 404, "no such directory, or not allowed"),
    "link to a directory outside": ("x", "{d}/link", 404, "no such directory, or not allowed"),
    "link to a file outside": ("x", "{d}/linked", 404, "no such directory, or not allowed"),
    "a file": ("x", "{d}/good/adapter_config.json", 404, "no such directory, or not allowed"),
    "a system file": ("x", "/etc/passwd", 404, "no such directory, or not allowed"),
    "null byte": ("x", "{d}/\0", 404, "no such directory, or not allowed"),
    "relative path": ("x", "./good", 400, "invalid reference"),
    "home": ("x", "~/good", 400, "invalid reference"),
    "empty directory": ("x", "{d}/empty", 404, "adapter_config.json"),
    "other shape": ("x", "{d}/shape", 400, "the base has"),
    "a model": ("x", BASE, 400, "is not an adapter"),
    "base not stored": ("x", "team/stray:v1", 404, "the base of the adapter is not stored"),
    "name of a model": ("taken", ONE, 400, "taken is the name of a model"),
    "invalid name": ("a:b", ONE, 400, "is not a valid name of an adapter"),
}


@pytest.fixture(scope="module")
def places(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An allowed directory with good and bad adapters; `outside` is next to it."""
    root = tmp_path_factory.mktemp("places")
    allowed, targets = root / "allowed", linears(tiny_model())
    write_peft(allowed / "good", targets, seed=9, size=0.3)
    outside = write_peft(root / "outside", targets)
    (allowed / "empty").mkdir()
    (allowed / "link").symlink_to(outside)
    write_peft(allowed / "linked", targets)
    (allowed / "linked" / "adapter_config.json").unlink()
    (allowed / "linked" / "adapter_config.json").symlink_to(outside / "adapter_config.json")
    write_peft(allowed / "shape", {"model.layers.0.self_attn.q_proj": (64, 32)})
    files = PackageRequest(safetensors_dir=write_tiny(root / "files"), context_size=77)
    modelpack.package("taken", files, store=world.store)
    other = PackageRequest(safetensors_dir=root / "files", context_size=66)
    base = modelpack.package("team/gone:v1", other, store=world.store)
    package_adapter("team/stray:v1", outside, "team/gone:v1", store=world.store)
    world.store.remove(str(base.digest), force=True)
    return allowed


@pytest.fixture(scope="module")
def http(world: World, places: Path) -> Iterator[TestClient]:
    with served(world, places) as (client, _):
        yield client


@pytest.mark.parametrize("case", REFUSED)
def test_refused(http: TestClient, places: Path, case: str) -> None:
    name, path, status, message = REFUSED[case]
    path = path.format(d=places, outside=places.parent / "outside")
    reply = load(http, name, path)
    assert (reply.status_code, message in reply.text) == (status, True), reply.text
    assert unload(http, name).status_code == 404
    assert load(http, "good", str(places / "good")).status_code == 200
    assert unload(http, "good").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"lora_name": "x"},
        {"lora_path": ONE},
        {"lora_name": "", "lora_path": ONE},
        {"lora_name": "x", "lora_path": 1},
        {"lora_name": "x", "lora_path": ONE, "load_inplace": True},
    ],
)
def test_invalid_bodies(http: TestClient, body: dict[str, object]) -> None:
    reply = http.post("/v1/load_lora_adapter", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] in ("lora_name", "lora_path", "load_inplace")


def test_paths_that_exist_and_that_do_not_give_the_same_error(
    http: TestClient, places: Path
) -> None:
    found = str(places.parent / "outside")
    texts = {load(http, "x", path).text.replace(path, "") for path in (found, found + "2")}
    assert len(texts) == 1


def test_no_directory_is_allowed_by_default(world: World) -> None:
    with served(world) as (http, _):
        assert load(http, "x", str(world.directory)).status_code == 404
        assert load(http, "x", ONE).status_code == 200


def test_off_by_default(world: World) -> None:
    with world.sources() as sources:
        pool = ModelPool(sources.catalogue(CONFIG))
        with TestClient(create_app(pool)) as http:
            assert load(http, "x", ONE).status_code == 404
            assert unload(http, "x").status_code == 404


def test_api_keys(world: World, tmp_path: Path) -> None:
    """Only a key for all models loads and unloads, even for a name that a key has."""
    file = tmp_path / "keys.toml"
    admin, bob = add_key(file, "admin"), add_key(file, "bob", models=("one", BASE))
    with world.sources() as sources:
        app = create_app(loading_pool(sources))
        guarded = protect(app, Protection(keys=KeyFile(file)), resolves=True)
        with TestClient(guarded, base_url="http://127.0.0.1") as http:
            for key, status in ((bob, 403), ("", 401), (admin, 200)):
                http.headers["x-api-key"] = key
                assert load(http, "one", ONE).status_code == status
            http.headers["x-api-key"] = bob
            assert complete(http, "one").status_code == 200
            assert unload(http, "one").status_code == 403
            http.headers["x-api-key"] = admin
            assert unload(http, "one").status_code == 200


@pytest.mark.long
def test_a_policy_holds_for_adapters_that_requests_load(
    world: World, remote_adapter: tuple[str, str], tmp_path: Path
) -> None:
    """Unsigned adapters and directories are refused; a signed adapter is pulled and loaded."""
    base, adapter = remote_adapter
    generate_key_pair(tmp_path / "ours", b"")
    key = read_private_key(tmp_path / "ours.key", b"")
    signatures.sign(base, key)
    remote = RemoteOptions(trust=Trust.of([key.public]), retry=RetryPolicy(tries=1))
    with World(LayoutStore(tmp_path / "store"), tmp_path).sources(remote) as sources:
        pool = loading_pool(sources, world.directory, model=base)
        with TestClient(create_app(pool), raise_server_exceptions=False) as http:
            files = (str(world.directory), "files on disk have no signatures")
            for path, text in ((adapter, "is not signed"), files):
                reply = load(http, "x", path)
                assert (reply.status_code, text in reply.text) == (403, True), reply.text
            signatures.sign(adapter, key)
            assert load(http, "x", adapter).status_code == 200
            assert complete(http, "x").status_code == 200


def test_commands(world: World) -> None:
    """`modelpack adapter` loads, lists and unloads; errors of the server are its own."""
    with (
        world.sources() as sources,
        ModelServer(
            lambda: loading_pool(sources, world.directory), address="127.0.0.1:0"
        ) as server,
    ):
        at = ("--url", server.url)
        assert succeed("adapter", "add", "one", ONE, *at).out == "one"
        succeed("adapter", "add", "two", os.path.relpath(world.directory), *at)
        listed = json.loads(succeed("adapter", "ls", "--json", *at).out)["adapters"]
        assert {(one["name"], one["base"]) for one in listed} == {("one", BASE), ("two", BASE)}
        table = succeed("adapter", "ls", *at).out.splitlines()
        assert table[0].split() == ["ADAPTER", "NAME", "BASE", "DIGEST"]
        assert len(table) == 3
        for arguments, code, text in (
            (("add", "one", ONE), 2, "has already been loaded"),
            (("add", "x", "./nowhere"), 3, "no such directory, or not allowed"),
            (("rm", "x"), 3, "cannot be found"),
        ):
            done = run("adapter", *arguments, *at)
            assert (done.code, text in done.err) == (code, True), done.err
        succeed("adapter", "rm", "one", *at)
        assert succeed("adapter", "ls", "--quiet", *at).out == "two"
    with (
        world.sources() as sources,
        ModelServer(lambda: ModelPool(sources.catalogue(CONFIG)), address="127.0.0.1:0") as server,
    ):
        done = run("adapter", "add", "one", ONE, "--url", server.url)
        assert done.code == 2
        assert "--allow-adapter-loading" in done.err


def test_options(tmp_path: Path) -> None:
    done = run("serve", "--adapter-directory", str(tmp_path), "--store", str(tmp_path))
    assert done.code == 2
    assert "--adapter-directory requires --allow-adapter-loading" in done.err
