"""The pool with a real store, real engines and a tiny model."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path

import mlx.core as mx
import pytest

import modelpack
from modelpack.errors import NotFoundError, UsageError
from modelpack.operations.package import PackageRequest
from modelpack.store.layout import LayoutStore
from modelpack_engine.config import EngineConfig
from modelpack_engine.errors import ModelLoadError, OutOfMemoryError
from modelpack_engine.models.load_progress import LoadProgress
from modelpack_engine.request import SamplingParams
from modelpack_server.conversation.chat import start_chat
from modelpack_server.conversation.served_model import ServedModel
from modelpack_server.conversation.spec import ChatSpec
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import DEFAULT_TEMPERATURE, ModelSettings
from modelpack_server.pool.store_catalogue import StoreCatalogue
from modelpack_server.repl.chat import Chat, LocalModels
from modelpack_server.tool_parsers.parts import Text
from tests.engine.serving.tiny import CONTEXT, reference_tokens, tiny_tokenizer, write_tiny

CONFIG = EngineConfig(device="cpu", max_num_seqs=2, max_num_batched_tokens=32, kv_cache_bytes=2**20)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LayoutStore:
    """A store with a model, and with the same model packaged for a smaller context."""
    root = tmp_path_factory.mktemp("pool")
    files = write_tiny(root / "files", temperature=0.0, top_k=5)
    made = LayoutStore(root / "store")
    for name, size in (("ai/tiny", None), ("team/small:v2", 100)):
        modelpack.package(
            name, PackageRequest(safetensors_dir=files, context_size=size), store=made
        )
    return made


async def say(model: ServedModel) -> str:
    spec = ChatSpec(
        [{"role": "user", "content": "hello"}],
        model.sampling_params({"ignore_eos": True}),
        max_tokens=6,
    )
    async with await start_chat(model, spec) as stream:
        deltas = [delta async for delta in stream]
    return "".join(p.text for d in deltas for p in d.parts if isinstance(p, Text))


def test_run_and_servers_have_the_same_default_temperature(tmp_path: Path) -> None:
    files, store = write_tiny(tmp_path / "files"), LayoutStore(tmp_path / "store")
    modelpack.package("ai/plain", PackageRequest(safetensors_dir=files), store=store)
    catalogue = StoreCatalogue(store, CONFIG)

    async def served() -> float:
        pool = ModelPool(catalogue, memory=2**30)
        async with pool.lease("plain") as model:
            temperature = model.sampling_params({}).temperature
        await pool.close()
        return temperature

    assert asyncio.run(served()) == DEFAULT_TEMPERATURE
    with LocalModels(catalogue, CONFIG) as models:
        assert Chat(models.load("plain")).params().temperature == DEFAULT_TEMPERATURE


def test_the_pool_reports_the_progress_of_a_load(tmp_path: Path) -> None:
    files, store = write_tiny(tmp_path / "files"), LayoutStore(tmp_path / "store")
    modelpack.package("ai/plain", PackageRequest(safetensors_dir=files), store=store)
    size = sum(path.stat().st_size for path in files.glob("*.safetensors"))
    found: list[tuple[str, LoadProgress | None]] = []
    catalogue = StoreCatalogue(store, CONFIG)
    with LocalModels(catalogue, CONFIG, lambda *report: found.append(report)) as models:
        models.load("plain")
    assert found[0][1] == LoadProgress(0, size)
    assert found[-2][1] == LoadProgress(size, size, warming_up=True)
    assert found[-1][1] is None
    assert {name for name, _ in found} == {"plain"}


def test_a_failed_load_is_not_logged_to_who_gets_the_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files, store = write_tiny(tmp_path / "files"), LayoutStore(tmp_path / "store")
    (files / "tokenizer.json").unlink()
    modelpack.package("ai/mute", PackageRequest(safetensors_dir=files), store=store)
    with (
        LocalModels(StoreCatalogue(store, CONFIG), CONFIG) as models,
        pytest.raises(ModelLoadError, match=r"no tokenizer\.json"),
    ):
        models.load("mute")
    assert caplog.messages == []


@pytest.mark.long
def test_a_model_that_comes_and_goes_leaves_nothing(store: LayoutStore) -> None:
    engines, memory = [], []

    async def run() -> None:
        pool = ModelPool(StoreCatalogue(store, CONFIG), memory=2**30)
        for _ in range(4):
            async with pool.lease("tiny") as model:
                await say(model)
                engines.append(weakref.ref(model.engine))
            del model
            assert await pool.unload(["tiny"]) == ["tiny"]
            gc.collect()
            memory.append(mx.get_active_memory())
        await pool.close()

    asyncio.run(run())
    assert [engine() for engine in engines] == [None] * 4
    assert len(set(memory)) == 1, memory


@pytest.mark.long
def test_two_models_answer_at_once_and_go(store: LayoutStore) -> None:
    tokenizer = tiny_tokenizer()
    prompt = tokenizer.encode("user: hello\nassistant:")
    expected = tokenizer.decode(reference_tokens(prompt, 6), skip_special_tokens=False)

    async def run() -> None:
        pool = ModelPool(StoreCatalogue(store, CONFIG), memory=2**30)
        before = mx.get_active_memory()
        async with pool.lease("tiny") as one, pool.lease("team/small:v2") as two:
            assert (one.max_model_len, two.max_model_len) == (CONTEXT, 100)
            assert one.sampling_params({}).temperature == 0
            assert one.sampling_params({}).top_k == 5
            assert await asyncio.gather(say(one), say(two)) == [expected, expected]
        memory = [model.memory for model in pool.running()]
        assert len(memory) == 2
        assert all(taken >= 2**18 for taken in memory)
        await pool.configure("tiny", ModelSettings(context_size=50, preset="creative"))
        async with pool.lease("docker.io/ai/tiny:latest") as again:
            assert again.max_model_len == 50
            assert again.sampling_params({}) == SamplingParams(
                temperature=1.0, top_p=0.98, min_p=0.02, presence_penalty=0.3, top_k=5
            )
        await pool.close()
        assert pool.running() == []
        assert mx.get_active_memory() - before < 2**20

    asyncio.run(run())


def test_what_is_not_there_or_does_not_fit(store: LayoutStore) -> None:
    async def run() -> None:
        pool = ModelPool(StoreCatalogue(store, CONFIG), memory=2**20)
        for name in ("other", "..", "", "a b"):
            with pytest.raises(NotFoundError):
                await pool.find(name)
        found = await pool.find("tiny")
        assert (await pool.find(found.key)).key == found.key
        assert found.names[0] == "tiny"
        assert sorted(model.names[0] for model in await pool.stored()) == ["team/small:v2", "tiny"]
        with pytest.raises(
            OutOfMemoryError, match=r"tiny needs about 1\.\d MiB; free are 1\.0 MiB"
        ):
            await pool.preload("tiny")
        with pytest.raises(UsageError, match=f"this model's context is {CONTEXT}"):
            await pool.configure("tiny", ModelSettings(context_size=1_000_000))
        await pool.close()

    asyncio.run(run())
