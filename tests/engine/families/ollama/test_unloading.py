"""Unloading and `num_ctx`: a model in use is unloaded later, and keeps its context."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from modelpack_server.api.ollama.bodies import TextBody
from modelpack_server.api.ollama.chat import fit_context, unload
from modelpack_server.pool.settings import ModelSettings
from tests.engine.pool.shelf import Shelf, pool_over


def test_a_model_in_use_goes_when_it_no_longer_is() -> None:
    async def run() -> None:
        shelf = Shelf(a=10, b=10)
        pool = pool_over(shelf)
        await unload(pool, "a")
        assert shelf.loads == []
        async with pool.lease("a"):
            await unload(pool, "a")
            assert [engine.key for engine in shelf.alive] == ["sha256:a"]
        await pool.reap()
        assert shelf.alive == []
        await pool.preload("b")
        await unload(pool, "b")
        assert shelf.alive == []
        await pool.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("settings", "options", "expected"),
    [
        (ModelSettings(engine={"default_model_len": 50}), {"num_ctx": 80}, 80),
        (ModelSettings(engine={"default_model_len": 50}), {"num_ctx": 20}, 50),
        (ModelSettings(engine={"default_model_len": 50}), {}, 50),
        (ModelSettings(preset="chat"), {"num_ctx": 9000}, 9000),
        (ModelSettings(preset="chat"), {"num_ctx": 100}, None),
        (ModelSettings(context_size=50), {"num_ctx": 80}, None),
        (ModelSettings(runtime_flags=("--ctx-size", "50")), {"num_ctx": 80}, None),
        (ModelSettings(), {"num_ctx": 80}, None),
    ],
)
def test_num_ctx_and_settings(
    settings: ModelSettings, options: dict[str, Any], expected: int | None
) -> None:
    async def run() -> None:
        shelf = Shelf(a=10)
        pool = pool_over(shelf)
        await pool.configure("a", settings)
        await fit_context(pool, TextBody(model="a", options=options))
        assert (await pool.settings("a")).engine.get("default_model_len") == expected
        await pool.close()

    asyncio.run(run())


def test_a_model_in_use_keeps_its_context() -> None:
    async def run() -> None:
        shelf = Shelf(a=10)
        pool = pool_over(shelf)
        await pool.configure("a", ModelSettings(engine={"default_model_len": 50}))
        async with pool.lease("a"):
            await fit_context(pool, TextBody(model="a", options={"num_ctx": 80}))
            assert len(shelf.alive) == 1
        assert (await pool.settings("a")).engine["default_model_len"] == 50
        await pool.close()

    asyncio.run(run())
