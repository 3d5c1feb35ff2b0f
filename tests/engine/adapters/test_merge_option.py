"""`--merge`: the server and the command line with an adapter in the weights of its base."""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from modelpack.cli.options import Settings
from modelpack.errors import NotFoundError, UsageError
from modelpack.operations.adapters import stored_adapter
from modelpack.operations.lookup import stored_model
from modelpack.operations.remote import RemoteOptions
from modelpack_engine.async_engine import AsyncEngine
from modelpack_engine.engine import Engine
from modelpack_engine.errors import ModelLoadError
from modelpack_server.api.app import ModelServer
from modelpack_server.cli.model_sources import ModelSources
from modelpack_server.gateway.caller import Caller
from modelpack_server.pool import names as access
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import ModelSettings
from modelpack_server.stored_models import open_model
from tests.adapters import write_peft
from tests.cli.running import modelpack as run
from tests.engine.adapters.test_server import BASE, CONFIG, ONE, PROMPT, TWO, World, world
from tests.engine.adapters.test_zoo import linears
from tests.engine.serving.tiny import tiny_model, tiny_tokenizer

__all__ = ["world"]


@pytest.fixture
def sources(world: World) -> Iterator[ModelSources]:
    settings = Settings(store_root=str(world.store.root), quiet=True)
    with ModelSources(settings, RemoteOptions(), merges_adapters=True) as made:
        yield made


def test_only_requests_for_the_adapter_are_answered(world: World, sources: ModelSources) -> None:
    prompt = tiny_tokenizer()._backend.encode(PROMPT).ids
    found = sources.open(BASE)
    sources.add_adapter("one", ONE, [found])

    def pool() -> ModelPool:
        made = ModelPool(sources.catalogue(CONFIG))
        made.pin(found.name)
        made.alias("gpt", str(found.model.digest))
        made.alias("mine", "one")
        return made

    with (
        ModelServer(pool, address="127.0.0.1:0") as server,
        httpx.Client(base_url=server.url, trust_env=False) as http,
    ):
        for name in ("one", ONE, f"{BASE}:one", "gpt:one", "mine"):
            body = {"model": name, "prompt": PROMPT, "max_tokens": 12}
            reply = http.post("/v1/completions", json=body).json()
            assert reply["choices"][0]["text"] == world.expected(ONE, prompt), name
        for name in ("gpt", BASE, str(found.model.digest)):
            reply = http.post("/v1/completions", json={"model": name, "prompt": PROMPT})
            assert reply.status_code == 404
            assert "served with the adapter one merged" in reply.text
        listed = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
        assert "one" in listed
        assert "mine" in listed
        assert listed["one"]["parent"] == BASE
        assert not {BASE, "gpt"} & listed.keys()


def test_restricted_keys(world: World, sources: ModelSources) -> None:
    sources.add_adapter("one", ONE, [sources.open(BASE)])
    pool = ModelPool(sources.catalogue(CONFIG))

    async def lease(name: str) -> str:
        async with pool.lease(name) as model:
            return model.name

    async def use() -> None:
        await pool.start()
        with access.acting_for(Caller("a", models=frozenset({BASE}))):
            with pytest.raises(NotFoundError) as error:
                await lease(BASE)
            assert "one" not in str(error.value)
            with pytest.raises(NotFoundError):
                await lease("one")
        with access.acting_for(Caller("b", models=frozenset({"one"}))):
            assert await lease("one") == "one"
        await pool.close()

    asyncio.run(use())


def test_the_engine_has_no_adapter(world: World, sources: ModelSources) -> None:
    """It is as fast as the base: on a CPU, our library runs it."""
    sources.add_adapter("one", ONE, [sources.open(BASE)])
    catalogue = sources.catalogue(CONFIG)
    pool = ModelPool(catalogue)

    async def use() -> tuple[int, str]:
        async with pool.lease("one") as model:
            assert isinstance(model.engine, AsyncEngine)
            engine = model.engine._ready()
            assert isinstance(engine, Engine)
            found = engine.config.max_loras, type(engine._runner).__name__
        await pool.close()
        return found

    bare = open_model(BASE, pull=False, store=world.store).engine(CONFIG)
    assert isinstance(bare, Engine)
    assert asyncio.run(use()) == (0, type(bare._runner).__name__)
    base = catalogue.find("one")
    assert catalogue.needs(catalogue.find(base.base), ModelSettings()) > 0


def test_an_invalid_adapter_is_named(sources: ModelSources, tmp_path: Path) -> None:
    path = write_peft(tmp_path / "nan", linears(tiny_model()), size=math.nan)
    sources.add_adapter("x", str(path), [sources.open(BASE)])

    async def use() -> None:
        pool = ModelPool(sources.catalogue(CONFIG))
        with pytest.raises(ModelLoadError, match=r"adapter x: .*not finite"):
            await pool.preload("x")
        await pool.close()

    asyncio.run(use())


def test_prefixes_are_not_the_bases(world: World, tmp_path: Path) -> None:
    """Prefixes on disk are found by the model with the same adapter only."""
    opened = open_model(BASE, pull=False, store=world.store)
    adapter = stored_adapter(stored_model(world.store, ONE), world.store)
    merged = opened.with_adapter(adapter, "one")
    other = opened.with_adapter(adapter, "two")
    assert len({opened.model_id, merged.model_id, other.model_id}) == 3


def test_one_adapter_for_each_model(world: World, sources: ModelSources) -> None:
    found = sources.open(BASE)
    sources.add_adapter("one", ONE, [found])
    with pytest.raises(UsageError, match="one adapter for each MODEL, got one and two"):
        sources.add_adapter("two", TWO, [found])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((BASE,), "--merge requires an adapter"),
        ((BASE, "--adapter", f"a={ONE}", "--adapter", f"b={TWO}"), "one adapter for each MODEL"),
        ((BASE, "--adapter", f"a={ONE}", "--allow-adapter-loading"), "cannot be combined with"),
    ],
)
def test_arguments(world: World, arguments: tuple[str, ...], message: str) -> None:
    done = run("serve", *arguments, "--merge", "--store", str(world.store.root))
    assert done.code == 2
    assert message in done.err


@pytest.fixture
def no_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))


@pytest.mark.usefixtures("no_stdin")
def test_an_adapter_that_does_not_fit(world: World, tmp_path: Path) -> None:
    path = write_peft(tmp_path / "bad", {"model.layers.0.self_attn.q_proj": (64, 32)})
    done = run("run", BASE, "a", "--adapter", f"a={path}", "--merge",
               "--store", str(world.store.root))  # fmt: skip
    assert done.code == 1
    assert "a weight of shape [64, 32]" in done.err


@pytest.mark.usefixtures("no_stdin")
def test_run(world: World) -> None:
    """`run` prints the text of the adapter, merged and not, and of an adapter as MODEL."""
    store = ("--store", str(world.store.root), "--device", "cpu", "--max-tokens", "8",
             "--temperature", "0", "--max-model-len", "64", "--kv-cache-bytes", "2MiB")  # fmt: skip
    one = ("--adapter", f"one={ONE}")
    texts = {
        name: run("run", *arguments, *store)
        for name, arguments in {
            "unmerged": (BASE, "Hello", *one),
            "merged": (BASE, "Hello", *one, "--merge"),
            "as MODEL": (ONE, "Hello"),
            "as MODEL, merged": (ONE, "Hello", "--merge"),
            "base": (BASE, "Hello"),
        }.items()
    }
    assert all(done.code == 0 for done in texts.values()), texts
    base = texts.pop("base").out
    assert len({done.out for done in texts.values()}) == 1
    assert base != texts["merged"].out
    done = run("run", BASE, "Hello", *one, "--url", "http://127.0.0.1:1")
    assert done.code == 2
    assert "--url cannot be combined with --adapter" in done.err


def test_smoke(world: World) -> None:
    """The report has the text of the adapter and its digest."""
    store = ("--store", str(world.store.root), "--device", "cpu", "--max-tokens", "8",
             "--max-model-len", "64", "--kv-cache-bytes", "2MiB")  # fmt: skip
    one = ("--adapter", f"one={ONE}")
    reports = [
        run("smoke", BASE, *store, *options).json for options in ((), one, (*one, "--merge"))
    ]
    base, unmerged, merged = (report["answer"] for report in reports)
    assert base != unmerged
    assert unmerged == merged
    digest = str(stored_model(world.store, ONE).digest)
    assert [report.get("adapter") for report in reports] == [None, digest, digest]
    for options, message in (
        (("--merge",), "--merge requires --adapter"),
        ((*one, "--adapter", f"two={TWO}"), "a test has one adapter, got 2"),
        ((*one, "--attest", "--key", "x"), "--attest cannot be combined with --adapter"),
    ):
        done = run("smoke", BASE, *store, *options)
        assert done.code == 2
        assert message in done.err
