"""A tiny model with random weights and a byte tokenizer, loaded like a real one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import tokenizers
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from tokenizers import decoders, models, pre_tokenizers

from modelpack.errors import NotFoundError
from modelpack_engine.async_engine import AsyncEngine
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.metrics import Meter
from modelpack_engine.engine import Engine
from modelpack_engine.models import LoadedModel, Tokenizer
from modelpack_engine.models.chat_template import ChatTemplate
from modelpack_engine.models.tokenizer import TokenText
from modelpack_engine.process_engine import ProcessEngine
from modelpack_server.api.app import ModelServer
from modelpack_server.pool.catalogue import LoadedEngine, StoredModel
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.settings import ModelSettings

EOS = 256
VOCAB = 257
CONTEXT = 256


def tiny_tokenizer() -> Tokenizer:
    """A tokenizer with a token for each byte and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    order = {character: i for i, character in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=order, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    return Tokenizer(backend, text=TokenText.BYTE_LEVEL, eos_token_ids=[EOS])


def tiny_model() -> llama.Model:
    """A Llama model with two layers and reproducible weights."""
    arguments = llama.ModelArgs(
        model_type="llama", hidden_size=64, num_hidden_layers=2, intermediate_size=128,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=VOCAB,
        rope_theta=10000.0, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
    )  # fmt: skip
    model = llama.Model(arguments)
    mx.random.seed(11)
    weights = []
    for name, value in tree_flatten(model.parameters()):
        scale = 0.2 if value.ndim == 1 else 1.6 / value.shape[-1] ** 0.5
        noise = mx.random.normal(value.shape) * scale
        weights.append((name, noise + 1 if value.ndim == 1 else noise))
    model.load_weights(weights)
    mx.eval(model.parameters())
    return model


def tiny_loaded() -> LoadedModel:
    """The model and its tokenizer, as the loaders return them."""
    return LoadedModel(
        tiny_model(), {"vocab_size": VOCAB}, tiny_tokenizer(), "llama", CONTEXT, (), 0
    )


def tiny_engine(**settings: object) -> Engine:
    """Return an engine with the tiny model; `settings` are fields of EngineConfig."""
    given = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "device": "cpu"} | settings
    return Engine(tiny_loaded(), EngineConfig(**given))  # type: ignore[arg-type]


def reference_tokens(prompt: list[int], count: int) -> list[int]:
    """Return the greedy output of mlx-lm's own generation."""
    model = tiny_model()
    steps = generate_step(
        mx.array(prompt), model, max_tokens=count, prompt_cache=make_prompt_cache(model)
    )
    return [int(token) for token, _ in steps]


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def chat_engine(**settings: object) -> Engine:
    """A tiny engine with a chat template and a short queue."""
    engine = tiny_engine(**({"max_waiting": 4, "max_num_seqs": 4} | settings))
    engine.tokenizer._chat_template = ChatTemplate(TEMPLATE)
    return engine


class TinyCatalogue:
    """A catalogue with one model, "tiny", whose engine `make_engine` creates on each load."""

    NAMES = ("tiny", "docker.io/ai/tiny:latest")

    def __init__(
        self,
        make_engine: Callable[[], Engine] = chat_engine,
        client: type[AsyncEngine | ProcessEngine] = AsyncEngine,
    ) -> None:
        self.make_engine = make_engine
        self.client = client
        self.engines: list[AsyncEngine | ProcessEngine] = []

    def version(self) -> object:
        return 1

    def find(self, name: str) -> StoredModel:
        if name not in self.NAMES:
            raise NotFoundError(f"there is no model {name!r}")
        return self.stored()[0]

    def stored(self) -> list[StoredModel]:
        return [StoredModel("sha256:tiny", self.NAMES, size=1000, context_size=CONTEXT)]

    def needs(self, model: StoredModel, settings: ModelSettings, limit: int | None = None) -> int:
        return 1000

    def load(
        self, model: StoredModel, settings: ModelSettings, meter: Meter, room: int | None
    ) -> LoadedEngine:
        engine = self.client(self.make_engine, meter)
        engine.wait_until_ready(60)
        self.engines.append(engine)
        return LoadedEngine(engine)


def write_tiny(directory: Path, **generation: object) -> Path:
    """Write the model as published, with a generation_config.json."""
    directory.mkdir()
    model = tiny_model()
    mx.save_safetensors(
        str(directory / "model.safetensors"),
        dict(tree_flatten(model.parameters())),
        metadata={"format": "pt"},
    )
    config = vars(model.args) | {"eos_token_id": EOS, "architectures": ["LlamaForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps(generation))
    tiny_tokenizer()._backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<eos>", "chat_template": TEMPLATE})
    )
    return directory


@contextmanager
def tiny_server(make_engine: Callable[[], Engine]) -> Iterator[str]:
    """Serve a `TinyCatalogue` with this engine; yield the server's address."""
    catalogue = TinyCatalogue(make_engine)
    with ModelServer(
        lambda: ModelPool(catalogue, memory=10_000, grace=0.0), address="127.0.0.1:0"
    ) as server:
        yield server.url
