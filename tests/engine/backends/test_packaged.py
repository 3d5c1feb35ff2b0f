"""Every backend uses the template, context length and defaults of a package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest

import modelpack
from modelpack.artifacts import media_types
from modelpack.builder.request import PackageRequest
from modelpack.store.layout import LayoutStore
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.metrics import Meter
from modelpack_server.pool.settings import ModelSettings
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.engine.loaders.tiny_models import TINY_MODELS

TEMPLATE = "{% for m in messages %}<packaged>{{ m.content }}{% endfor %}"
DEFAULTS = {"parameters": {"temperature": 0.25, "num_predict": 7}, "system": "Be brief."}


@pytest.mark.parametrize("backend", ["mlx", "llama.cpp"])
def test_a_package_says_how_its_model_answers(
    request: pytest.FixtureRequest, tmp_path: Path, backend: str
) -> None:
    if backend == "llama.cpp":
        request.getfixturevalue("llama_cpp")
    mx.random.seed(3)
    template = tmp_path / "mine.jinja"
    template.write_text(TEMPLATE)
    store = LayoutStore(tmp_path / "store")
    packaged = PackageRequest(
        gguf=TINY_MODELS["llama"].write(tmp_path / "small.gguf"),
        chat_template=template,
        context_size=48,
        annotations={media_types.DEFAULTS: json.dumps(DEFAULTS)},
    )
    modelpack.package("team/small", packaged, store=store)
    config = EngineConfig(
        device="cpu", backend=cast(Any, backend), max_num_seqs=2, max_num_batched_tokens=32
    )
    catalogue = StoreCatalogue(store, config)
    loaded = catalogue.load(catalogue.find("team/small"), ModelSettings(), Meter(), None)
    engine = cast(Any, loaded.engine)
    try:
        assert engine.max_model_len == 48
        assert engine.tokenizer.chat_template == TEMPLATE
        assert loaded.defaults == {"temperature": 0.25, "max_tokens": 7}
        assert loaded.preface.system == "Be brief."
    finally:
        engine.close()
