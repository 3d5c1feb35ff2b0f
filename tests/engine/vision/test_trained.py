"""A trained model reads held-out pictures: digits and shapes, from a store, through the APIs.

`fixtures/pictures` has the model. Its answers are right or wrong, which those of random weights
cannot be.
"""

from __future__ import annotations

import base64
import importlib
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import anthropic
import mlx.core as mx
import ollama
import openai
import pytest
from PIL import Image

from fixtures.pictures import model, samples
from modelpack import package
from modelpack.builder.request import PackageRequest
from modelpack.store.layout import LayoutStore
from modelpack_server.api.app import ModelServer
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.engine.vision import projectors
from tests.engine.vision.media import url

pytestmark = [pytest.mark.weights, pytest.mark.long]

#: Sends a picture and a question; returns the answer.
Ask = Callable[[str, bytes, str], str]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader")
    model.write(path)
    return path


@pytest.fixture(scope="module")
def address(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store = LayoutStore(tmp_path_factory.mktemp("store"))
    package("reader", PackageRequest(safetensors_dir=directory), store=store)
    with ModelServer(lambda: ModelPool(StoreCatalogue(store)), address="127.0.0.1:0") as server:
        yield server.url


@pytest.fixture(scope="module")
def gguf_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the same model in GGUF, with a projector."""
    text, eyes = projectors.write_trained(tmp_path_factory.mktemp("gguf"))
    store = LayoutStore(tmp_path_factory.mktemp("gguf-store"))
    package("reader", PackageRequest(gguf=text, mmproj=eyes), store=store)
    with ModelServer(lambda: ModelPool(StoreCatalogue(store)), address="127.0.0.1:0") as server:
        yield server.url


def png(sample: samples.Sample) -> bytes:
    """Return the picture as a file, four times as wide and high: the processor scales it."""
    made = io.BytesIO()
    image = Image.fromarray(sample.pixels)
    image.resize((256, 256), Image.Resampling.NEAREST).save(made, "PNG")
    return made.getvalue()


@cache
def openai_client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none")


def by_openai(address: str, picture: bytes, question: str) -> str:
    content: Any = [
        {"type": "image_url", "image_url": {"url": url(picture)}},
        {"type": "text", "text": question},
    ]
    answer = openai_client(address).chat.completions.create(
        model="reader", messages=[{"role": "user", "content": content}],
        max_tokens=12, temperature=0,
    )  # fmt: skip
    return answer.choices[0].message.content or ""


def by_anthropic(address: str, picture: bytes, question: str) -> str:
    source: Any = {
        "type": "base64", "media_type": "image/png", "data": base64.b64encode(picture).decode(),
    }  # fmt: skip
    content: Any = [{"type": "image", "source": source}, {"type": "text", "text": question}]
    with anthropic.Anthropic(base_url=address, api_key="none") as client:
        [block] = client.messages.create(
            model="reader", max_tokens=12, messages=[{"role": "user", "content": content}],
            extra_body={"temperature": 0},
        ).content  # fmt: skip
    assert block.type == "text"
    return block.text


def by_ollama(address: str, picture: bytes, question: str) -> str:
    message = {"role": "user", "content": question, "images": [picture]}
    with ollama.Client(address) as client:
        options = {"temperature": 0, "num_predict": 12}
        return client.chat("reader", messages=[message], options=options).message.content or ""


def answers(address: str, ask: Ask, asked: list[tuple[samples.Sample, str]]) -> list[str]:
    """Return the answers, of four questions at once."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda each: ask(address, png(each[0]), each[1]), asked))


def share_right(found: list[str], asked: list[tuple[samples.Sample, str]]) -> float:
    """Return the share of answers that are right."""
    pairs = zip(found, asked, strict=True)
    return sum(answer == sample.answers[text] for answer, (sample, text) in pairs) / len(asked)


def questions(num_digits: int, num_shapes: int) -> list[tuple[samples.Sample, str]]:
    """Return held-out samples, each with one of its questions in turn."""
    return [
        (sample, list(sample.answers)[index % len(sample.answers)])
        for index, sample in enumerate(samples.held_out(num_digits, num_shapes))
    ]


def test_digits_and_shapes(address: str) -> None:
    asked = questions(3, 3)
    assert share_right(answers(address, by_openai, asked), asked) == 1


@pytest.mark.parametrize("asked", [questions(100, 0), questions(0, 40)], ids=["digits", "shapes"])
def test_95_of_100_held_out_pictures(
    asked: list[tuple[samples.Sample, str]], address: str, gguf_address: str
) -> None:
    """By each API; by the GGUF file and its projector as many, within 1 %."""
    found = answers(address, by_openai, asked)
    for ask in (by_anthropic, by_ollama):
        assert answers(address, ask, asked) == found
    share = share_right(found, asked)
    gguf = share_right(answers(gguf_address, by_openai, asked), asked)
    print(f"safetensors {share:.2%}, GGUF {gguf:.2%} of {len(asked)}")
    assert share >= 0.95
    assert gguf >= 0.95
    assert abs(share - gguf) <= 0.01


def test_another_picture_is_another_answer(address: str) -> None:
    """The picture decides, not the question: the wrong one gives the wrong answer."""
    one, two = (sample for sample, _ in questions(0, 2))
    assert by_openai(address, png(one), samples.WHAT) == one.answers[samples.WHAT]
    assert by_openai(address, png(two), samples.WHAT) != one.answers[samples.WHAT]


def test_the_answers_are_mlx_vlms(address: str, directory: Path) -> None:
    """mlx-vlm's processor and model give the same text for the same files.

    One pass over a prompt and its answer shows that each token is the likeliest one.
    """
    package_, arguments = model.peer_package()
    processing: Any = importlib.import_module("mlx_vlm.models.idefics3.processing_idefics3")
    peer = package_.Model(arguments)
    weights = peer.sanitize(mx.load(str(directory / "model.safetensors")))
    weights["language_model.lm_head.weight"] = weights["language_model.embed_tokens.weight"]
    peer.load_weights(list(peer.vision_model.sanitize(weights).items()))
    peer.set_dtype(mx.float32)
    processor = processing.Idefics3Processor.from_pretrained(directory)
    asked = questions(100, 40)
    found = answers(address, by_openai, asked)
    assert len(set(found)) > 10
    for (sample, question), answer in zip(asked, found, strict=True):
        prompt = f"<|im_start|>user\n<image>{question}<|im_end|>\n<|im_start|>assistant\n"
        image = Image.open(io.BytesIO(png(sample)))
        inputs = processor(images=[image], text=[prompt])
        ids, pixels = mx.array(inputs.pop("input_ids")), inputs.pop("pixel_values")
        inputs.pop("attention_mask")
        embedded = peer.get_input_embeddings(ids, pixels, **inputs).inputs_embeds
        expected = processor.tokenizer.encode(answer, add_special_tokens=False)
        rows = mx.array([expected])
        embedded = mx.concatenate([embedded, peer.language_model.embed_tokens(rows)], axis=1)
        ids = mx.concatenate([ids, rows], axis=1)
        logits = peer.language_model(inputs=ids, inputs_embeds=embedded).logits
        likeliest = mx.argmax(logits[0, -len(expected) - 1 :], axis=-1).tolist()
        assert likeliest == [*expected, model.CONFIG["eos_token_id"]]
