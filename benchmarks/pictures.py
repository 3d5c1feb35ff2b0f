"""Compare requests with pictures with mlx-vlm's single-request path, with random weights.

    PYTHONPATH=.:engine python benchmarks/pictures.py [--shape tiny] [--count 64]

The shape is Qwen2.5-VL-7B's; a picture has 924 x 868 pixels and 1,023 tokens. (On a GPU, mlx-vlm
ends where the tower's windows fill a picture.) Prints one JSON object for each measurement: for
several pictures, one request and another question about the picture; in rounds, `count` requests at
once, each with a new picture, other questions about these pictures, and as many requests of text
alone. mlx-vlm then answers one request, whose time includes the processing of the picture, and
twice `count` requests at once by its batched generator, without the processing.

With `--beside` instead, half as many requests of text generate tokens, alone, beside one request
with 20 pictures, and beside requests with a picture each, one a second. All pictures are new.

With `--http` instead, requests come over HTTP, one at a time: a first and a second question about
each of several pictures, as JPEG, and as many tokens of text. Engine and server are one process.

With `--together` instead, `count` requests at once each have a small picture; in turns, pictures
that wait are encoded together and one by one. All pictures are new.
"""

from __future__ import annotations

import argparse
import base64
import gc
import importlib
import io
import json
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from modelpack_engine.async_engine import AsyncEngine
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.metrics import Meter
from modelpack_engine.engine import Engine
from modelpack_engine.models import load
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.request import EngineRequest, SamplingParams
from modelpack_engine.vision.processor import Picture
from modelpack_server.api.app import ModelServer
from modelpack_server.bench.report import percentile
from modelpack_server.pool.catalogue import LoadedEngine
from modelpack_server.pool.pool import ModelPool
from tests.engine.serving.tiny import TinyCatalogue
from tests.engine.vision import tiny

KIND = "qwen2_5_vl"
_7B: dict[str, Any] = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "rope_theta": 1e6,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "model_type": KIND, "spatial_merge_size": 2, "depth": 32, "hidden_size": 1280,
        "intermediate_size": 3420, "num_heads": 16, "patch_size": 14, "in_channels": 3,
        "out_hidden_size": 3584, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    },
}  # fmt: skip
_7B_SETTINGS = {"patch_size": 14, "min_pixels": 3136, "max_pixels": 12845056}

#: Of one request at a time, each about other pictures than the requests at once.
QUESTIONS = {"one request": "What is it?", "its picture again": "How many are there?"}
ALONE = 12
#: Questions of the requests at once, and their rounds, of which the first ones record steps.
AT_ONCE_QUESTIONS = {"at once": "Describe it.", "the pictures again": "Why is it so?"}
AT_ONCE, AT_ONCE_WARM = 4, 2
#: Tokens of each text beside pictures, and rounds, of which the first ones record steps.
BESIDE_TOKENS, ROUNDS, WARM = 1024, 6, 3


def show(measured: str, figures: dict[str, Any]) -> None:
    print(json.dumps({"measured": measured, **figures}), flush=True)


def write_model(path: Path, config: dict[str, Any], settings: dict[str, Any]) -> None:
    """Write a model with random weights in bfloat16, or float32 on a CPU."""
    package, arguments = tiny.arguments_of(KIND)
    dtype = mx.bfloat16 if mx.default_device() == mx.gpu else mx.float32
    mx.random.seed(5)
    weights = {}
    for name, value in tree_flatten(package.Model(arguments).parameters()):
        if value.ndim == 1 and name.endswith("weight"):
            weights[name] = mx.ones(value.shape, dtype)
        else:
            weights[name] = mx.random.normal(value.shape, dtype) / value.shape[-1] ** 0.5
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    documents = {
        "config.json": config,
        "preprocessor_config.json": settings,
        "tokenizer_config.json": {
            "eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": tiny.prompt_of(tiny.placeholder(KIND), tiny.TEMPLATE),
        },
    }  # fmt: skip
    for name, document in documents.items():
        (path / name).write_text(json.dumps(document))
    tiny._tokenizer().save(str(path / "tokenizer.json"))


def run(engine: Engine, requests: Sequence[EngineRequest]) -> dict[str, Any]:
    """Run requests that are sent at the same time, after idle time as a server has it."""
    while engine.use_idle_time():
        pass
    began, first, tokens = time.perf_counter(), {}, 0
    for index, request in enumerate(requests):
        engine.add_request(f"r{index}", request)
    while engine.has_work:
        for event in engine.step():
            assert event.error is None, event.error
            if event.token_ids:
                first.setdefault(event.request_id, time.perf_counter() - began)
                tokens += len(event.token_ids)
    seconds = time.perf_counter() - began
    return {
        "requests": len(requests), "tokens": tokens, "s": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds, 1),
        "first_token_p50_s": round(statistics.median(first.values()), 4),
        "first_token_max_s": round(max(first.values()), 4),
    }  # fmt: skip


def make_engine(path: Path, num_seqs: int) -> Engine:
    gpu = mx.default_device() == mx.gpu
    config = EngineConfig(
        max_num_seqs=num_seqs,
        device="gpu" if gpu else "cpu",
        kv_cache_bytes=(16 << 30) if gpu else (64 << 20),
    )
    return Engine(load(ModelFiles.from_directory(path), device=config.device), config)


def text_request(random: np.random.Generator, size: int, tokens: int) -> EngineRequest:
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    return EngineRequest(random.integers(0, 200, size).tolist(), params)


def measure(path: Path, count: int, length: int, pictures: list[Picture]) -> None:
    engine = make_engine(path, count)

    def asked(index: int, question: str, tokens: int = length) -> EngineRequest:
        return tiny.request(engine, f"<image>{question}", [pictures[index]], tokens)

    def text(seed: int, size: int) -> EngineRequest:
        return text_request(np.random.default_rng(seed), size, length)

    size = len(asked(0, "What is it?").prompt_token_ids)
    show("engine", {"notes": engine.notes, "prompt_tokens": size, "count": count})
    for question in QUESTIONS.values():
        run(engine, [asked(0, question, 8)])
    run(engine, [text(seed, size) for seed in range(count)])
    for index in range(count, len(pictures)):
        for measured, question in QUESTIONS.items():
            show(measured, run(engine, [asked(index, question, 16)]))
    random = np.random.default_rng(3)
    for number in range(AT_ONCE):
        about: dict[str, Any] = {"round": number, "warm": number < AT_ONCE_WARM}
        for index in range(count):
            pixels = random.integers(0, 256, pictures[0].pixels.shape, np.uint8)
            pictures[index] = Picture(pixels)
        for measured, question in AT_ONCE_QUESTIONS.items():
            show(measured, about | run(engine, [asked(i, question) for i in range(count)]))
        texts = [text(count * (number + 1) + seed, size) for seed in range(count)]
        show("text alone", about | run(engine, texts))


def measure_beside(path: Path, count: int, tokens: int, size: tuple[int, int]) -> None:
    """Measure requests of text alone, and beside pictures that no request had before."""
    engine, random = make_engine(path, 2 * count), np.random.default_rng(1)

    def asked(pictures: int) -> EngineRequest:
        new = [Picture(random.integers(0, 256, (*size, 3), np.uint8)) for _ in range(pictures)]
        return tiny.request(engine, "<image>" * pictures + "What is it?", new, 16)

    def texts() -> list[EngineRequest]:
        return [text_request(random, 200, tokens) for _ in range(count)]

    for number in range(ROUNDS):
        about = {"round": number, "warm": number < WARM, "texts": count}
        show("texts alone", about | run_beside(engine, texts(), [], 0))
        show("beside 20 pictures", about | run_beside(engine, texts(), [asked(20)], 0))
        others = [asked(1) for _ in range(20)]
        show("beside a picture a second", about | run_beside(engine, texts(), others, 1))


def measure_together(path: Path, count: int) -> None:
    """Measure requests with small pictures that are encoded together, or one by one."""
    engine, random = make_engine(path, count), np.random.default_rng(2)
    assert engine.vision is not None
    encoder = engine.vision.encoder
    kinds = encoder._batched
    show("engine", {"notes": engine.notes, "batched": [*kinds], "count": count})
    for side in (224, 448):
        for number in range(ROUNDS):
            for together in (True, False):
                encoder._batched = kinds if together else frozenset()
                new = [
                    Picture(random.integers(0, 256, (side, side, 3), np.uint8))
                    for _ in range(count)
                ]
                asked = [tiny.request(engine, "<image>What is it?", [each], 8) for each in new]
                about = {"round": number, "side": side, "together": together}
                show("small pictures", about | run(engine, asked))


def measure_http(path: Path, size: tuple[int, int]) -> None:
    """Measure first tokens over HTTP of two questions about each picture, and of text.

    The engine runs in a thread of the server, as by `serve --no-engine-process`.
    """
    sys.setswitchinterval(0.001)  # as `AppServer.run` does, but not `start`
    catalogue = Served(lambda: make_engine(path, 8), AsyncEngine)
    pool = lambda: ModelPool(catalogue, memory=10_000, grace=0.0)  # noqa: E731
    with ModelServer(pool, address="127.0.0.1:0") as server:
        for number in range(ALONE):
            buffer = io.BytesIO()
            Image.fromarray(tiny.picture(number, *size).pixels).save(buffer, "JPEG", quality=90)
            data = base64.b64encode(buffer.getvalue()).decode()
            shown = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}
            about = {"picture": number, "bytes": len(buffer.getvalue())}
            for measured, question in QUESTIONS.items():
                text = {"type": "text", "text": question}
                show(f"http, {measured}", about | first_token(server.url, [shown, text]))
            words = f"{number} is a number. " * (size[0] * size[1] // 11_800)  # as many tokens
            text = {"type": "text", "text": words}
            show("http, text", about | first_token(server.url, [text]))


def first_token(url: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the time to an answer of one token, and the tokens of the prompt."""
    body = {
        "model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 1,
        "temperature": 0,
    }  # fmt: skip
    raw = json.dumps(body).encode()
    asked = urllib.request.Request(
        f"{url}/v1/chat/completions", raw, {"content-type": "application/json"}
    )
    began = time.perf_counter()
    with urllib.request.urlopen(asked) as answer:
        usage = json.load(answer)["usage"]
    seconds = time.perf_counter() - began
    assert usage["completion_tokens"] == 1, usage
    return {"first_token_ms": round(1e3 * seconds, 2), "prompt_tokens": usage["prompt_tokens"]}


class Served(TinyCatalogue):
    """A catalogue with one model, whose engine may take minutes to load."""

    def load(self, *_: Any) -> LoadedEngine:
        engine = self.client(self.make_engine, Meter())
        engine.wait_until_ready(600)
        return LoadedEngine(engine)


def run_beside(
    engine: Engine, texts: Sequence[EngineRequest], others: list[EngineRequest], every_s: float
) -> dict[str, Any]:
    """Run texts, and when all have their first tokens, one of the others after the other."""
    for index, request in enumerate(texts):
        engine.add_request(f"text-{index}", request)
    times: dict[str, list[float]] = {}
    sent, due, running = 0, 0.0, len(texts)
    while engine.has_work:
        if running and len(times) >= len(texts) and sent < len(others):
            due = due or time.perf_counter()
            if time.perf_counter() >= due:
                engine.add_request(f"other-{sent}", others[sent])
                sent, due = sent + 1, due + every_s
        for event in engine.step():
            assert event.error is None, event.error
            if event.token_ids:
                times.setdefault(event.request_id, []).append(time.perf_counter())
            running -= event.finish_reason is not None and event.request_id.startswith("text")
    own = [each for name, each in times.items() if name.startswith("text")]
    gaps = [b - a for each in own for a, b in pairwise(each)]
    per_token = [(each[-1] - each[0]) / (len(each) - 1) for each in own]
    seconds = max(each[-1] for each in own) - max(each[0] for each in own)

    def ms(values: list[float], *percents: int) -> dict[str, float]:
        return {f"p{each}": round(1e3 * percentile(values, each), 2) for each in percents}

    return {
        "others": sent, "tokens_per_s": round(sum(map(len, own)) / seconds, 1),
        "tpot_ms": ms(per_token, 50, 99), "gap_ms": ms(gaps, 50, 90, 99, 100),
    }  # fmt: skip


def measure_peer(path: Path, length: int, pictures: list[Picture]) -> None:
    """Measure mlx-vlm: one request by its model, then all pictures by its batched generator."""
    package, arguments = tiny.arguments_of(KIND)
    model = package.Model(arguments)
    model.load_weights(str(path / "model.safetensors"))
    module: Any = importlib.import_module(f"mlx_vlm.models.{KIND}.processing_{KIND}")
    processor = module.Qwen2_5_VLProcessor.from_pretrained(path)
    tiny._peer = lambda _: (model, processor)
    for tokens in (1, 1, length + 1):
        began = time.perf_counter()
        tiny.expected(KIND, "<image>Describe it.", [pictures[-1]], tokens)
        seconds = time.perf_counter() - began
        show("mlx-vlm, one request", {"tokens": tokens, "s": round(seconds, 3)})
    for number in range(2):  # in the first, kernels are compiled
        found = _run_peer(model, processor, pictures, length)
        show("mlx-vlm, at once", {"round": number} | found)


def _run_peer(
    model: Any, processor: Any, pictures: Sequence[Picture], length: int
) -> dict[str, Any]:
    """Run mlx-vlm's `batch_generate`; the times are those after the pictures are processed."""
    batched: Any = importlib.import_module("mlx_vlm.generate.ar")
    utils: Any = importlib.import_module("mlx_vlm.utils")
    tokenizers: Any = importlib.import_module("mlx_vlm.tokenizer_utils")
    processor.detokenizer = tokenizers.NaiveStreamingDetokenizer(processor.tokenizer)
    processor.tokenizer.stopping_criteria = utils.StoppingCriteria([-1], processor.tokenizer)
    times: dict[str, float] = {}
    first: dict[int, float] = {}
    generator, prepare_inputs = batched.BatchGenerator, batched.prepare_inputs

    class Timed(generator):  # type: ignore[misc]
        def next(self, **options: Any) -> Any:
            found = super().next(**options)
            for each in found[1]:
                first.setdefault(each.uid, time.perf_counter() - times["processed"])
            return found

    def timed(*arguments: Any, **options: Any) -> Any:
        found = prepare_inputs(*arguments, **options)
        mx.eval(found)
        times["processed"] = time.perf_counter()
        return found

    batched.BatchGenerator, batched.prepare_inputs = Timed, timed
    try:
        began = time.perf_counter()
        batched.batch_generate(
            model, processor,
            images=[Image.fromarray(each.pixels) for each in pictures],
            prompts=["Describe it."] * len(pictures), max_tokens=length,
        )  # fmt: skip
    finally:
        batched.BatchGenerator, batched.prepare_inputs = generator, prepare_inputs
    seconds = time.perf_counter() - times["processed"]
    return {
        "requests": len(pictures), "processing_s": round(times["processed"] - began, 3),
        "s": round(seconds, 3), "tokens_per_s": round(len(pictures) * length / seconds, 1),
        "first_token_p50_s": round(statistics.median(first.values()), 4),
        "first_token_max_s": round(max(first.values()), 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=["7b", "tiny"], default="7b")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--no-peer", action="store_true", help="without mlx-vlm")
    parser.add_argument("--beside", action="store_true", help="texts beside pictures, no more")
    parser.add_argument("--http", action="store_true", help="questions over HTTP, no more")
    parser.add_argument("--together", action="store_true", help="small pictures, no more")
    parser.add_argument("--layers", type=int, default=28, help="of the language model")
    options = parser.parse_args()
    config, settings = tiny.config_of(KIND), tiny.settings_of(KIND)
    size = (24, 40)
    if options.shape == "7b":
        config, settings, size = config | _7B, settings | _7B_SETTINGS, (924, 868)
        config["num_hidden_layers"] = options.layers
    tiny.config_of = lambda _: config
    show("versions", {"mlx": mx.__version__, **vars(options)})  # type: ignore[attr-defined]
    random = np.random.default_rng(0)
    pictures = [
        Picture(random.integers(0, 256, (*size, 3), np.uint8)) for _ in range(options.count + ALONE)
    ]
    with tempfile.TemporaryDirectory(prefix="modelpack-pictures-") as directory:
        path = Path(directory)
        write_model(path, config, settings)
        gc.collect()
        mx.clear_cache()
        if options.http:
            measure_http(path, size)
            return
        if options.together:
            measure_together(path, options.count)
            return
        if options.beside:
            measure_beside(path, options.count // 2, BESIDE_TOKENS, size)
            return
        measure(path, options.count, options.length, pictures)
        gc.collect()
        mx.clear_cache()
        if not options.no_peer:
            measure_peer(path, options.length, pictures[: options.count])


if __name__ == "__main__":
    main()
