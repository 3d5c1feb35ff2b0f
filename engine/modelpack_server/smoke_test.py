"""The smoke test: does a model load, answer sensibly, and answer fast enough?"""

from __future__ import annotations

import math
import platform
import re
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

import modelpack
from modelpack.artifacts.digest import Digest
from modelpack.errors import ModelpackError, UsageError
from modelpack.operations.lookup import stored_model
from modelpack.operations.remote import RemoteOptions
from modelpack.store.layout import LayoutStore
from modelpack_engine.config import EngineConfig
from modelpack_engine.speech.transcript import SAMPLE_RATE, TranscriptionRequest
from modelpack_server.conversation.served_model import ServedModel
from modelpack_server.conversation.spec import Finish
from modelpack_server.pool.adapters import Adapters
from modelpack_server.pool.entry import told
from modelpack_server.pool.store_catalogue import StoreCatalogue
from modelpack_server.repl.chat import Chat, LocalModels
from modelpack_server.tool_parsers.parts import Reasoning, Text

if TYPE_CHECKING:
    from modelpack_engine.embedding.async_embedder import AsyncEmbedder
    from modelpack_engine.models.load_progress import LoadProgress
    from modelpack_engine.speech.async_transcriber import AsyncTranscriber

#: The default prompts, by what they come with.
PROMPTS = {
    "text": "What is the capital of France?",
    "picture": "What is in the picture?",
    "sound": "What do you hear?",
}

# One token so often in a row is no language, whatever the model.
_REPEATS = 12
_TONE_SECONDS = 2.0
# Texts that are as short as this may be one token twice: "no, no".
_SHORT = 4


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; `problem` is None if it was well."""

    name: str
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class SmokeReport:
    """What a smoke test saw. Times are in seconds; `error` is what kept it from an answer.

    Of a model that generates text there are `answer` and what follows it, of one that embeds or
    ranks `dimensions`, the length of its vectors. `images` and `sounds` are the digests of
    files, `adapter` is that of the adapter's manifest.
    """

    reference: str | None
    digest: str
    prompt: str
    images: tuple[str, ...] = ()
    sounds: tuple[str, ...] = ()
    adapter: str | None = None
    checks: tuple[Check, ...] = ()
    error: str | None = None
    load_seconds: float = 0.0
    answer: str | None = None
    reasoning: str | None = None
    finish: Finish | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    time_to_first_token: float = 0.0
    tokens_per_second: float = 0.0
    dimensions: int | None = None
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def problems(self) -> tuple[str, ...]:
        """All that was wrong; empty if it passed."""
        found = [check.problem for check in self.checks if check.problem is not None]
        return (*([self.error] if self.error is not None else []), *found)

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Return the report for programs."""
        report: dict[str, Any] = {
            "passed": self.passed,
            "problems": list(self.problems),
            "checks": {check.name: check.problem is None for check in self.checks},
            "reference": self.reference,
            "digest": self.digest,
            "prompt": self.prompt,
            **({"images": list(self.images)} if self.images else {}),
            **({"sounds": list(self.sounds)} if self.sounds else {}),
            **({"adapter": self.adapter} if self.adapter is not None else {}),
            "load_seconds": round(self.load_seconds, 3),
            "device": self.device,
            "versions": self.versions,
        }
        if self.dimensions is not None:
            return report | {"prompt_tokens": self.prompt_tokens, "dimensions": self.dimensions}
        return report | {
            "answer": self.answer or "",
            "reasoning": self.reasoning,
            "finish_reason": self.finish,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "time_to_first_token_seconds": round(self.time_to_first_token, 3),
            "tokens_per_second": round(self.tokens_per_second, 2),
        }


def smoke_test(
    name: str,
    store: LayoutStore,
    config: EngineConfig | None = None,
    *,
    prompt: str = PROMPTS["text"],
    expect: str | None = None,
    min_tokens_per_second: float | None = None,
    max_tokens: int = 64,
    pictures: Sequence[dict[str, Any]] = (),
    adapters: Adapters | None = None,
    remote: RemoteOptions | None = None,
    on_progress: Callable[[str, LoadProgress | None], None] | None = None,
) -> SmokeReport:
    """Load the model `name` of the store, ask it once, greedily, and check the answer.

    `on_progress` gets the model's name and how far its load is. `pictures` come before the prompt;
    they are parts of `PictureReader`, sounds too. `adapters` may have one adapter of the model,
    which is tested with it.

    Where `remote` says who is trusted, the model has to be signed.

    It must not be empty, hold characters that no text has, or repeat one token; it has to come to
    an end, and to match the regular expression `expect`. A model for embeddings gets the prompt as
    a text, one for speech a tone. A failure to load or to answer is reported, not raised; raises
    `NotFoundError`, and `UsageError` for an invalid regular expression.
    """
    try:
        pattern = re.compile(expect) if expect is not None else None
    except re.error as error:
        raise UsageError(f"{expect!r} is not a regular expression: {error}") from None
    config = config or EngineConfig()
    catalogue = StoreCatalogue(store, config, remote=remote, adapters=adapters)
    from modelpack_engine.platform.device import choose_device  # MLX: after the catalogue's BLAS

    stored = stored_model(store, name)
    adapter = next(iter(adapters.of(str(stored.digest))), None) if adapters is not None else None
    report = SmokeReport(
        str(stored.reference) if stored.reference is not None else None, str(stored.digest), prompt,
        _digests(pictures, "picture"), _digests(pictures, "sound"),
        adapter.key if adapter is not None else None,
        device=choose_device(config), versions=_versions(),
    )  # fmt: skip
    start = time.perf_counter()
    try:
        with LocalModels(catalogue, config, on_progress) as models:
            model = models.load(name if adapter is None else adapter.name)
            report = replace(report, load_seconds=time.perf_counter() - start)
            return models.call(
                _try(model, report, pattern, min_tokens_per_second, max_tokens, pictures)
            )
    except UsageError:
        raise
    except ModelpackError as error:
        return replace(report, error=told(error))


def _digests(parts: Sequence[dict[str, Any]], kind: str) -> tuple[str, ...]:
    return tuple(str(Digest.of(part[kind].data)) for part in parts if kind in part)


async def _try(
    model: ServedModel,
    report: SmokeReport,
    pattern: re.Pattern[str] | None,
    min_speed: float | None,
    max_tokens: int,
    pictures: Sequence[dict[str, Any]],
) -> SmokeReport:
    from modelpack_engine.embedding.async_embedder import AsyncEmbedder
    from modelpack_engine.speech.async_transcriber import AsyncTranscriber

    if isinstance(model.engine, AsyncTranscriber):
        if pattern is not None or min_speed is not None or pictures:
            raise UsageError(
                "a speech-to-text model gets a tone, without a prompt, files or expectations",
                hint="leave out --expect, --min-tps, --image and --audio",
            )
        return await _transcribe(model.engine, report)
    if isinstance(model.engine, AsyncEmbedder):
        if pattern is not None or min_speed is not None:
            raise UsageError("an embedding model writes no text that could be expected or timed")
        if pictures:
            raise UsageError("an embedding model reads text only")
        return await _embed(model.engine, report)
    chat = Chat(model, given={"temperature": 0.0}, max_tokens=max_tokens)
    start = time.perf_counter()
    first = 0.0
    texts, thoughts, last = [], [], None
    tokens: list[int] = []
    async with aclosing(chat.ask(report.prompt, pictures)) as deltas:
        async for delta in deltas:
            if delta.token_ids and not first:
                first = time.perf_counter()
            tokens += delta.token_ids
            texts += [part.text for part in delta.parts if isinstance(part, Text)]
            thoughts += [part.text for part in delta.parts if isinstance(part, Reasoning)]
            last = delta
    end = time.perf_counter()
    # The first token's time is the prompt's; the rest is the speed of generation.
    speed = (len(tokens) - 1) / (end - first) if len(tokens) > 1 and end > first else 0.0
    answer, reasoning = "".join(texts), "".join(thoughts)
    finish = last.finish if last is not None else None
    checks = list(check_text(answer or reasoning, tokens, finish))
    if pattern is not None:
        found = pattern.search(answer)
        checks.append(Check("expected", None if found else f"no match of {pattern.pattern!r}"))
    if min_speed is not None:
        slow = f"{speed:.1f} tokens a second, expected {min_speed} or more"
        checks.append(Check("speed", slow if speed < min_speed else None))
    return replace(
        report, checks=tuple(checks), answer=answer, reasoning=reasoning or None, finish=finish,
        prompt_tokens=last.usage.prompt_tokens if last is not None and last.usage else 0,
        completion_tokens=len(tokens), time_to_first_token=(first or end) - start,
        tokens_per_second=speed,
    )  # fmt: skip


def check_text(text: str, tokens: Sequence[int], finish: Finish | None) -> tuple[Check, ...]:
    """Return what is to be said of any answer, whatever was asked."""
    if finish == "length":  # it may have been cut within a character
        text = text.rstrip("\ufffd")
    wrong = sorted({c for c in text if not c.isprintable() and not c.isspace()} | {"\ufffd"})
    strange = [c for c in wrong if c in text]
    longest = _longest_run(tokens)
    repeats = longest >= _REPEATS or (len(tokens) > _SHORT and longest == len(tokens))
    return (
        Check("not empty", None if text.strip() else "the answer is empty"),
        Check("printable", f"the answer holds {strange[0]!a}" if strange else None),
        Check("varied", f"the answer is one token {longest} times in a row" if repeats else None),
        Check("ended", None if finish in ("stop", "length") else f"the answer ended by {finish}"),
    )


async def _embed(engine: AsyncEmbedder, report: SmokeReport) -> SmokeReport:
    if engine.ranks_pairs:
        scores = await engine.score([(report.prompt, report.prompt)])
        vector, tokens = list(scores.values), scores.num_tokens
    else:
        result = await engine.embed([report.prompt])
        vector, tokens = [float(value) for value in result.vectors[0]], result.num_tokens
    return replace(
        report, checks=check_vector(vector), dimensions=len(vector), prompt_tokens=tokens
    )


async def _transcribe(engine: AsyncTranscriber, report: SmokeReport) -> SmokeReport:
    """Transcribe a rising tone; the text may be empty, since it contains no speech."""
    at = np.arange(int(_TONE_SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    tone = (0.5 * np.sin(2 * np.pi * (200 + 100 * at) * at)).astype(np.float32)
    made = await engine.transcribe(TranscriptionRequest(tone))
    [check] = [one for one in check_text(made.text, (), "stop") if one.name == "printable"]
    return replace(report, prompt="", checks=(check,), answer=made.text, finish="stop")


def check_vector(vector: Sequence[float]) -> tuple[Check, ...]:
    """Return what is to be said of any embedding."""
    finite = all(map(math.isfinite, vector))
    return (
        Check("finite", None if finite else "the vector holds what is no number"),
        Check("not zero", None if any(vector) else "all of the vector is zero"),
    )


def _longest_run(tokens: Sequence[int]) -> int:
    return max((len(list(run)) for _, run in groupby(tokens)), default=0)


def _versions() -> dict[str, str]:
    return {
        "modelpack": modelpack.__version__, "mlx": version("mlx"), "mlx-lm": version("mlx-lm"),
        "python": platform.python_version(), "platform": platform.platform(),
    }  # fmt: skip
