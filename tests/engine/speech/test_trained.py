"""A model that was trained to write down digits (fixtures/speech): real meaning, over HTTP.

What random weights write cannot be right or wrong; this can.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest

import modelpack
from fixtures.speech.samples import SECONDS, sample
from modelpack.store.layout import LayoutStore
from modelpack_engine.config import EngineConfig
from modelpack_server.api.app import ModelServer
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.store_catalogue import StoreCatalogue
from tests.engine.speech.tiny import Samples, wav

MODEL = Path(__file__).parents[3] / "fixtures" / "speech" / "model"
#: The training uses smaller seeds.
HELD_OUT = 1_000_000_000


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    store = LayoutStore(tmp_path_factory.mktemp("digits") / "store")
    modelpack.package("digits", modelpack.PackageRequest(safetensors_dir=MODEL), store=store)
    catalogue = StoreCatalogue(store, EngineConfig(device="cpu"))
    with (
        ModelServer(lambda: ModelPool(catalogue), address="127.0.0.1:0") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def transcribed(client: openai.OpenAI, sound: Samples, rate: int = 16_000) -> str:
    return client.audio.transcriptions.create(model="digits", file=("a.wav", wav(sound, rate))).text


@pytest.mark.long
def test_held_out_digits(client: openai.OpenAI) -> None:
    samples = [sample(HELD_OUT + number) for number in range(100)]
    with ThreadPoolExecutor(4) as threads:
        texts = list(threads.map(lambda one: transcribed(client, one.sound), samples))
    right = sum(text == one.text for text, one in zip(texts, samples, strict=True))
    assert right >= 95, right


def test_words_are_spoken_when_the_transcript_says(client: openai.OpenAI) -> None:
    late = []
    for number in range(10):
        one = sample(HELD_OUT + 1000 + number)
        made = client.audio.transcriptions.create(
            model="digits", file=("a.wav", wav(one.sound)), response_format="verbose_json",
            timestamp_granularities=["word"],
        )  # fmt: skip
        if made.text == one.text:
            assert made.words is not None
            late += [word.start - at for word, at in zip(made.words, one.starts, strict=True)]
    assert len(late) > 20
    assert max(map(abs, late)) < 0.2
    assert abs(np.mean(late)) < 0.08


def test_long_sound_is_read_across_windows(client: openai.OpenAI) -> None:
    """160 s are two windows of Parakeet."""
    samples = [sample(HELD_OUT + 2000 + number) for number in range(40)]
    text = transcribed(client, np.concatenate([one.sound for one in samples]))
    said = " ".join(one.text for one in samples).split()
    wrong = _distance(text.split(), said)
    assert len(samples) * SECONDS == 160
    assert wrong <= 0.05 * len(said), (wrong, len(said))


def test_sound_of_another_rate_and_pitch(client: openai.OpenAI) -> None:
    one = sample(HELD_OUT + 3)
    at = np.arange(0, len(one.sound) - 1, 16_000 / 44_100)
    faster = np.interp(at, np.arange(len(one.sound)), one.sound).astype(np.float32)
    assert transcribed(client, faster, 44_100) == one.text
    # The same samples played at another rate are other tones.
    assert transcribed(client, faster, 32_000) != one.text


def _distance(one: list[str], other: list[str]) -> int:
    """Return the words to insert, delete or replace (Levenshtein)."""
    row = list(range(len(other) + 1))
    for number, left in enumerate(one, start=1):
        before, row[0] = row[0], number
        for place, right in enumerate(other, start=1):
            before, row[place] = row[place], min(
                row[place] + 1, row[place - 1] + 1, before + (left != right)
            )  # fmt: skip
    return row[-1]
