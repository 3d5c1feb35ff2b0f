"""LoRA adapters in the server: every API, names, lists, API keys, policies, and refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import anthropic
import ollama
import openai
import pytest
from starlette.testclient import TestClient

import modelpack
from modelpack.artifacts import media_types
from modelpack.builder.request import PackageRequest
from modelpack.cli.options import Settings
from modelpack.errors import ModelpackError, NotFoundError, UntrustedError, UsageError
from modelpack.operations import signatures
from modelpack.operations.adapters import package_adapter, stored_adapter
from modelpack.operations.lookup import stored_model
from modelpack.operations.remote import RemoteOptions
from modelpack.registry import RetryPolicy
from modelpack.store.layout import LayoutStore
from modelpack.testing import registry
from modelpack.trust.keys import generate_key_pair, read_private_key
from modelpack.trust.policy import Trust
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.metrics import Meter
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_server.api.app import ModelServer, create_app
from modelpack_server.api.openai.models import parent
from modelpack_server.cli.model_sources import ModelSources
from modelpack_server.gateway.caller import Caller
from modelpack_server.pool import names as access
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import ModelSettings
from modelpack_server.pool.store_catalogue import StoreCatalogue
from modelpack_server.stored_models import open_model
from tests.adapters import write_peft
from tests.cli.running import modelpack as run
from tests.engine.adapters.test_zoo import linears
from tests.engine.pool.test_pool import loop
from tests.engine.serving.test_engine import run as finish
from tests.engine.serving.test_engine import tokens
from tests.engine.serving.tiny import tiny_model, tiny_tokenizer, write_tiny

Q = "model.layers.0.self_attn.q_proj"
CONFIG = EngineConfig(
    device="cpu", max_num_seqs=4, max_num_batched_tokens=32, kv_cache_bytes=2**21, self_test=False
)
BASE, ONE, TWO = "team/tiny:v1", "team/one:v1", "team/two:v1"
PROMPT = "My printer does not print"


@dataclass
class World:
    """A store with a base and the adapters ONE and TWO; TWO's files are in `directory`."""

    store: LayoutStore
    directory: Path

    def sources(self, remote: RemoteOptions | None = None) -> ModelSources:
        settings = Settings(store_root=str(self.store.root), quiet=True)
        return ModelSources(settings, remote or RemoteOptions(), max_adapters=1)

    def expected(self, adapter: str | None, prompt: list[int]) -> str:
        """Return the greedy text of an engine with one of the stored adapters."""
        engine = open_model(BASE, pull=False, store=self.store).engine(
            replace(CONFIG, backend="mlx", max_loras=1)
        )
        if adapter is not None:
            opened = stored_adapter(stored_model(self.store, adapter), self.store)
            engine.add_adapter("x", opened, "identity")
        params = SamplingParams(temperature=0.0, max_tokens=12)
        name = "x" if adapter else None
        engine.add_request("0", EngineRequest(prompt, params, continues_text=True, adapter=name))
        return tiny_tokenizer()._backend.decode(tokens(finish(engine)["0", 0]))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("adapters")
    store = LayoutStore(root / "store")
    files = write_tiny(root / "files", temperature=0.0)
    modelpack.package(BASE, PackageRequest(safetensors_dir=files), store=store)
    targets = linears(tiny_model())
    for seed, (name, rank) in enumerate(((ONE, 2), (TWO, 5)), start=1):
        path = write_peft(root / str(seed), targets, rank=rank, seed=seed, size=0.3)
        package_adapter(name, path, BASE, store=store)
    return World(store, root / "2")


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.long)])
def url(request: pytest.FixtureRequest, world: World) -> Iterator[str]:
    """A server of the base with `one`, an artifact, and `two`, a directory.

    Its engine runs in the server's process, or in one of its own.
    """
    with world.sources() as sources:
        found = sources.open(BASE)
        sources.add_adapter("one", ONE, [found])
        sources.add_adapter("two", str(world.directory), [found])

        def pool() -> ModelPool:
            made = ModelPool(sources.catalogue(CONFIG, engine_process=request.param))
            made.pin(found.name)
            made.alias("gpt", str(found.model.digest))
            return made

        with ModelServer(pool, address="127.0.0.1:0") as server:
            yield server.url


#: The names that choose each adapter.
NAMES = {
    "gpt": None, BASE: None, "one": ONE, "two": TWO, f"{BASE}:one": ONE, "gpt:two": TWO, ONE: ONE,
    f"docker.io/{BASE}:two": TWO,
}  # fmt: skip


@pytest.mark.long
def test_openai(url: str, world: World) -> None:
    """Each text equals that of an engine with the adapter."""
    prompt = tiny_tokenizer()._backend.encode(PROMPT).ids
    expected = {adapter: world.expected(adapter, prompt) for adapter in (None, ONE, TWO)}
    assert len(set(expected.values())) == 3
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
        for name, adapter in NAMES.items():
            reply = client.completions.create(model=name, prompt=PROMPT, max_tokens=12)
            assert (reply.model, reply.choices[0].text) == (name, expected[adapter])
        messages = [{"role": "user", "content": PROMPT}]
        chats = {
            name: client.chat.completions.create(
                model=name, messages=messages, max_tokens=12  # type: ignore[arg-type]
            ).choices[0].message.content
            for name in (BASE, "one", "two")
        }  # fmt: skip
        assert len(set(chats.values())) == 3
        stream = client.chat.completions.create(
            model="gpt:two", messages=messages, max_tokens=12, stream=True  # type: ignore[arg-type]
        )  # fmt: skip
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == chats["two"]
        answer = client.responses.create(model="one", input=PROMPT, max_output_tokens=16)
        assert answer.output_text.startswith(str(chats["one"]))
        for name in (f"{BASE}:three", f"{ONE}:two", "three", ":one", "one:", "one:two"):
            with pytest.raises(openai.NotFoundError, match="no such model"):
                client.completions.create(model=name, prompt=PROMPT, max_tokens=1)


def test_list(url: str, world: World) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
        listed = {model.id: model.model_dump() for model in client.models.list()}
        assert {"gpt", BASE, "one", "two"} <= set(listed)
        assert (listed["one"]["parent"], listed["one"]["root"]) == (
            BASE, str(stored_model(world.store, ONE).digest),
        )  # fmt: skip
        assert listed["two"]["parent"] == BASE
        assert "parent" not in listed[BASE]
        assert client.models.retrieve(f"{BASE}:one").model_dump()["parent"] == BASE


def test_a_stored_adapter_that_is_not_served_is_no_model(world: World) -> None:
    """It is in no list, and a request that names it gets 404 and a hint."""
    with world.sources() as sources:
        found = sources.open(BASE)
        sources.add_adapter("one", ONE, [found])
        with ModelServer(
            lambda: ModelPool(sources.catalogue(CONFIG)), address="127.0.0.1:0"
        ) as server:
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
                names = {model.id for model in client.models.list()}
                assert TWO not in names
                assert {BASE, "one"} <= names
                with pytest.raises(openai.NotFoundError) as caught:
                    client.chat.completions.create(
                        model=TWO, messages=[{"role": "user", "content": "hi"}]
                    )
            assert "is an adapter, which cannot run without its base" in str(caught.value)
            assert "--adapter" in str(caught.value)
            with ollama.Client(server.url) as tags:
                listed = {str(model.model) for model in tags.list().models}
            assert not any(name.startswith(TWO) for name in listed)


def test_anthropic_and_ollama(url: str) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="x") as gpt,
        anthropic.Anthropic(base_url=url, api_key="x") as claude,
        ollama.Client(url) as client,
    ):
        for name in (BASE, "one", f"{BASE}:two"):
            expected = gpt.chat.completions.create(
                model=name, messages=messages, max_tokens=12  # type: ignore[arg-type]
            ).choices[0].message.content  # fmt: skip
            reply = claude.messages.create(model=name, messages=messages, max_tokens=12)  # type: ignore[arg-type]
            assert [block.text for block in reply.content if block.type == "text"] == [expected]
            answer = client.chat(name, messages, options={"num_predict": 12})
            assert answer.message.content == expected
        listed = {str(model.model).removesuffix(":latest") for model in client.list().models}
        assert {"one", "two"} <= listed


def test_api_keys_name_adapters_of_their_own(world: World) -> None:
    """A key for the base does not name its adapters, and a key for an adapter not the base."""

    @loop
    async def check() -> None:
        with world.sources() as sources:
            found = sources.open(BASE)
            for name, ref in (("one", ONE), ("two", TWO)):
                sources.add_adapter(name, ref, [found])
            pool = ModelPool(sources.catalogue(CONFIG))
            with access.acting_for(Caller("alice", (BASE,))):
                for name in ("one", f"{BASE}:one", ONE, str(stored_model(world.store, ONE).digest)):
                    with pytest.raises(NotFoundError, match="no such model"):
                        await pool.find(name)
                assert [model.names for model in await pool.stored()] == [(BASE,)]
            with access.acting_for(Caller("bob", ("one",))):
                assert (await pool.find(f"{BASE}:one")).names == ("one",)
                async with pool.lease("one") as model:
                    assert (model.name, model.adapter) == ("one", "one")
                [listed] = await pool.stored()
                assert await parent(pool, listed) == {"parent": None}
                for name in (BASE, "two", found.model.digest):
                    with pytest.raises(NotFoundError, match="no such model"):
                        await pool.find(str(name))
                assert pool.running() == []
                with pytest.raises(UsageError, match="one is an adapter"):
                    await pool.configure("one", ModelSettings(context_size=64))
            await pool.close()

    check()


@pytest.fixture
def remote_adapter(world: World, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A registry with the base and an adapter of it; their names."""
    with registry(tmp_path / "registry") as server:
        base, adapter = f"{server.host}/team/tiny:v1", f"{server.host}/team/three:v1"
        files = write_tiny(tmp_path / "files")
        origin = LayoutStore(tmp_path / "origin")
        request = PackageRequest(safetensors_dir=files)
        modelpack.package(base, request, push=True, store=origin)
        path = write_peft(tmp_path / "3", linears(tiny_model()), seed=3, size=0.3)
        package_adapter(adapter, path, base, store=origin, push=True)
        yield base, adapter


def test_an_adapter_as_model_pulls_its_base(
    remote_adapter: tuple[str, str], tmp_path: Path
) -> None:
    _, adapter = remote_adapter
    fresh = World(LayoutStore(tmp_path / "store"), tmp_path)
    with fresh.sources() as sources:
        found = sources.open(adapter)
        catalogue = sources.catalogue(CONFIG)
        model = catalogue.find(found.name)
        assert model.base == str(stored_model(fresh.store, model.base).digest)
        assert model.names == (adapter,)
        loaded = catalogue.load(catalogue.find(model.base), ModelSettings(), Meter(), None)
        assert catalogue.needs(catalogue.find(model.base), ModelSettings()) > model.size
        loaded.engine.close()


@pytest.mark.sample(1)
@pytest.mark.parametrize("signed", ["base", "adapter", "both"])
def test_policies_hold_for_adapters_and_bases(
    remote_adapter: tuple[str, str], tmp_path: Path, signed: str
) -> None:
    base, adapter = remote_adapter
    generate_key_pair(tmp_path / "ours", b"")
    key = read_private_key(tmp_path / "ours.key", b"")
    if signed != "adapter":
        signatures.sign(base, key)
    if signed != "base":
        signatures.sign(adapter, key)
    remote = RemoteOptions(trust=Trust.of([key.public]), retry=RetryPolicy(tries=1))
    fresh = World(LayoutStore(tmp_path / "store"), tmp_path)
    with fresh.sources(remote) as sources:
        if signed == "both":
            found = sources.open(base)
            sources.add_adapter("three", adapter, [found])
            with pytest.raises(UntrustedError, match="files on disk have no signatures"):
                sources.add_adapter("four", str(tmp_path / "3"), [found])
            assert sources.open(adapter).name == adapter
        else:
            with pytest.raises(UntrustedError, match="is not signed"):
                sources.open(adapter)
            assert len(sources.adapters) == 0


@pytest.mark.sample(1)
@pytest.mark.parametrize("merges", [False, True])
def test_adapters_are_checked_when_they_are_loaded(
    remote_adapter: tuple[str, str], tmp_path: Path, merges: bool
) -> None:
    """A server with a policy does not load an unsigned adapter that the store has, or merge it."""
    base, adapter = remote_adapter
    generate_key_pair(tmp_path / "ours", b"")
    key = read_private_key(tmp_path / "ours.key", b"")
    signatures.sign(base, key)
    fresh = World(LayoutStore(tmp_path / "store"), tmp_path)
    with fresh.sources() as sources:
        digest = sources.open(adapter).model.digest
    sources.adapters.merges = merges
    remote = RemoteOptions(trust=Trust.of([key.public]), retry=RetryPolicy(tries=1))
    catalogue = StoreCatalogue(fresh.store, CONFIG, remote=remote, adapters=sources.adapters)
    model = catalogue.find(catalogue.find(adapter).base)
    with pytest.raises(UntrustedError, match=f"{digest}: is not signed"):
        catalogue.load(model, ModelSettings(), Meter(), None)
    signatures.sign(adapter, key)
    catalogue.load(model, ModelSettings(), Meter(), None).engine.close()


#: NAME=SOURCE, the MODELs before it, and the error. {two} is a directory, {dir} a new one.
REFUSED = {
    "no model": ("x", ONE, (), "--adapter requires a MODEL"),
    "empty name": ("", ONE, (BASE,), "'' is not a valid name of an adapter"),
    "colon": ("a:b", ONE, (BASE,), "'a:b' is not a valid name of an adapter"),
    "path as name": ("../x", ONE, (BASE,), "'../x' is not a valid name"),
    "long name": ("x" * 129, ONE, (BASE,), "is not a valid name"),
    "name of a model": ("taken", ONE, (BASE,), "taken is a stored model"),
    "a model": ("x", BASE, (BASE,), "team/tiny:v1 is not an adapter"),
    "other base": ("x", ONE, ("team/other:v1",), "its base is .*, which is not a MODEL"),
    "adapter as base": ("x", "{two}", (ONE,), "is an adapter itself"),
    "no such path": ("x", "./nowhere", (BASE,), "no such file or directory: ./nowhere"),
    "empty directory": ("x", "{dir}", (BASE,), "adapter_config.json"),
    "other shape": ("x", "{shape}", (BASE,), "the base has"),
    "unknown module": ("x", "{module}", (BASE,), "the base has no module"),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_start(world: World, tmp_path: Path, case: str) -> None:
    name, source, models, message = REFUSED[case]
    store = LayoutStore(tmp_path / "store")
    files = write_tiny(tmp_path / "files")
    modelpack.package(BASE, PackageRequest(safetensors_dir=files), store=store)
    request = PackageRequest(safetensors_dir=files, context_size=99)
    for other in ("team/other:v1", "taken"):
        modelpack.package(other, request, store=store)
    path = write_peft(tmp_path / "one", linears(tiny_model()), size=0.3)
    package_adapter(ONE, path, BASE, store=store)
    (tmp_path / "dir").mkdir()
    module = "model.layers.0.self_attn.q_proj"
    paths = {
        "two": world.directory,
        "dir": tmp_path / "dir",
        "shape": write_peft(tmp_path / "shape", {module: (64, 32)}),
        "module": write_peft(tmp_path / "module", {"model.layers.9.self_attn.q_proj": (64, 64)}),
    }
    with World(store, tmp_path).sources() as sources:
        found = [sources.open(model) for model in models]
        with pytest.raises(ModelpackError, match=message) as error:
            sources.add_adapter(name, source.format(**paths), found)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("way", ["--adapter", "MODEL"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [("shape", r"a weight of shape \[64, 32\], but the base has"), ("module", "has no module"),
     ("config", "peft_type")],
)  # fmt: skip
def test_unchecked_artifacts_are_refused_at_start(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    message: str,
    way: str,
) -> None:
    """An artifact that another tool packaged without a check: the error has what was typed."""
    store = LayoutStore(tmp_path / "store")
    files = write_tiny(tmp_path / "files")
    modelpack.package(BASE, PackageRequest(safetensors_dir=files), store=store)
    layer = {"module": "model.layers.9.self_attn.q_proj"}.get(fault, Q)
    path = write_peft(tmp_path / "one", {layer: (64, 64 if fault != "shape" else 32)})
    with monkeypatch.context() as patched:
        patched.setattr("modelpack.operations.adapters.check_base", lambda *_, **__: None)
        packaged = package_adapter(ONE, path, BASE, store=store)
    if fault == "config":
        kinds = {layer.media_type: layer.digest for layer in packaged.manifest.layers}
        config = store.blob_path(kinds[media_types.DOCKER_MODEL_FILE])
        config.chmod(0o644)
        config.write_text("{}")
    with World(store, tmp_path).sources() as sources:
        found = sources.open(BASE)
        start = partial(sources.add_adapter, "x", ONE, [found])
        with pytest.raises(ModelpackError, match=message) as error:
            (start if way == "--adapter" else partial(sources.open, ONE))()
        assert str(error.value).startswith(ONE if way == "MODEL" else f"--adapter x={ONE}: ")
        assert len(sources.adapters) == 0


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("changes", "message"),
    [({"config": b"{}"}, "adapter x: "), ({"rank": 3}, "adapter x: "), ({"nan": 1}, "not finite")],
)
def test_refused_when_loaded(
    world: World, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    """An artifact that another tool packaged: the error names the adapter, others answer."""
    store = LayoutStore(tmp_path / "store")
    files = write_tiny(tmp_path / "files", temperature=0.0)
    modelpack.package(BASE, PackageRequest(safetensors_dir=files), store=store)
    request = PackageRequest(safetensors_dir=files, context_size=99)
    modelpack.package("team/other:v1", request, store=store)
    size = math.nan if "nan" in changes else 0.3
    path = write_peft(tmp_path / "one", linears(tiny_model()), size=size)
    packaged = package_adapter(ONE, path, BASE, store=store)
    layers = {str(layer.media_type): layer for layer in packaged.manifest.layers}
    with World(store, tmp_path).sources() as sources:
        sources.add_adapter("x", ONE, [sources.open(BASE)])
        if "nan" not in changes:  # a file of the store that does not match its digest
            config = next(
                store.blob_path(layer.digest) for kind, layer in layers.items()
                if kind == media_types.DOCKER_MODEL_FILE
            )  # fmt: skip
            text = b"{}" if "config" in changes else config.read_bytes().replace(b"2", b"3")
            config.chmod(0o644)
            config.write_bytes(text)
        pool = ModelPool(sources.catalogue(CONFIG))
        with TestClient(create_app(pool), raise_server_exceptions=False) as http:
            body = {"model": "x", "prompt": "a", "max_tokens": 1}
            reply = http.post("/v1/completions", json=body)
            assert reply.status_code == 500
            assert message in reply.text
            assert "Traceback" not in reply.text
            body["model"] = "team/other:v1"
            assert http.post("/v1/completions", json=body).status_code == 200


def test_arguments(world: World) -> None:
    for value in ("x", "=y", "x="):
        done = run("serve", "--adapter", value, "--store", str(world.store.root))
        assert done.code == 2
        assert "expected NAME=REF or NAME=DIR" in done.err
