"""Embedder and CrossEncoder: a loaded model, its tokenizer, and the steps around them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import mlx.core as mx
import numpy as np

from modelpack_engine.embedding.encoder import Encoder
from modelpack_engine.embedding.request import (
    BatchLimits,
    Embeddings,
    EmbedOptions,
    Input,
    InputReader,
    Pair,
    Prepared,
    Scores,
    Vector,
    split_batches,
    within_total,
)
from modelpack_engine.embedding.sentence_transformers import PoolingMode, Steps, pool
from modelpack_engine.errors import EngineError, RequestError
from modelpack_engine.models.tokenizer import Tokenizer

Config = TypeVar("Config")
Result = TypeVar("Result")

#: An `Encoder` or a `Decoder`: hidden states [texts, tokens, size] of token ids that are padded on
#: the right, lengths and type ids.
Backbone = Callable[[mx.array, mx.array, mx.array], mx.array]


def as_arrays(batch: Sequence[Prepared]) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Return ids and types int32 [texts, tokens], padded with 0; lengths and skipped [texts]."""
    longest = max(map(len, batch))

    def padded(rows: Iterable[tuple[int, ...]]) -> mx.array:
        return mx.array([[*row, *[0] * (longest - len(row))] for row in rows], mx.int32)

    return (
        padded(each.token_ids for each in batch),
        padded(each.type_ids for each in batch),
        mx.array([len(each) for each in batch], mx.int32),
        mx.array([each.skipped for each in batch], mx.int32),
    )


@dataclass(frozen=True, slots=True)
class CrossEncoderConfig:
    """`max_length` counts the tokens of query and document together, with the special ones."""

    architecture: str
    max_length: int


@dataclass(eq=False)
class _BatchModel(ABC, Generic[Config, Result]):
    """A model that computes one result per input, in batches of inputs of similar length.

    Only the thread that loaded the model may call it, except `read` and `finish`.
    """

    config: Config
    reader: InputReader
    limits: BatchLimits
    notes: tuple[str, ...]
    weight_bytes: int

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, which any thread may use."""
        return self.reader.tokenizer

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return self.reader.vocab_size

    @abstractmethod
    def run(self, batch: Sequence[Prepared]) -> list[Result]:
        """Return the results of one batch, before the options of requests are applied."""

    def _run_all(self, prepared: Sequence[Prepared]) -> list[Result]:
        found: dict[int, Result] = {}
        for places in split_batches([len(each) for each in prepared], self.limits):
            found.update(zip(places, self.run([prepared[at] for at in places]), strict=True))
        return [found[at] for at in range(len(prepared))]


@dataclass(eq=False)
class CrossEncoder(_BatchModel[CrossEncoderConfig, float]):
    """Scores pairs of texts."""

    encoder: Encoder

    def score(self, pairs: Sequence[Pair], *, truncate: bool = False) -> Scores:
        """Return the logits of (query, document); `sigmoid` maps them to scores from 0 to 1.

        `truncate` cuts the longer text of a pair that is too long, which otherwise raises
        `ContextLengthError`. Raises `EngineError` if a logit is not finite.
        """
        prepared = self.read(pairs, truncate=truncate)
        return self.finish(self._run_all(prepared), prepared)

    def read(self, pairs: Sequence[Pair], *, truncate: bool) -> list[Prepared]:
        """Return the pairs as tokens; any thread may call it."""
        return within_total(
            (
                self.reader.read_pair(index, query, document, truncate=truncate)
                for index, (query, document) in enumerate(pairs)
            ),
            "documents",
        )

    def run(self, batch: Sequence[Prepared]) -> list[float]:
        """Return the logits of one batch."""
        token_ids, type_ids, lengths, _ = as_arrays(batch)
        hidden = self.encoder(token_ids, lengths, type_ids)
        logits = self.encoder.classify(hidden, lengths)[:, 0].astype(mx.float32)
        return [float(logit) for logit in np.array(logits)]

    def finish(self, logits: Sequence[float], prepared: Sequence[Prepared]) -> Scores:
        """Check the logits of a request, and return its scores; any thread may call it."""
        for index, logit in enumerate(logits):
            if not np.isfinite(logit):
                raise EngineError(f"the score of document {index} is not a finite number")
        return Scores(tuple(logits), tuple(len(each) for each in prepared))


_SHORTEST = 1e-12


@dataclass(frozen=True, slots=True)
class EmbedderConfig:
    """The configuration of an embedding model, from its files.

    `dimension` is the size of its vectors; `max_length` counts tokens, special ones included.
    `prompts` are texts by name; a request may ask to put one before its inputs. Without
    `pools_prompt`, a prompt's tokens are read but not pooled.
    """

    architecture: str
    dimension: int
    max_length: int
    pooling: tuple[PoolingMode, ...]
    normalize: bool
    pools_prompt: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class Embedder(_BatchModel[EmbedderConfig, Vector]):
    """Computes vectors of texts."""

    backbone: Backbone
    steps: Steps

    def embed(
        self,
        inputs: Sequence[Input],
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncate: bool = False,
        prompt: str | None = None,
    ) -> Embeddings:
        """Return the vectors of texts or lists of token ids. Options: `EmbedOptions`.

        Raises `RequestError` for options that the model cannot fulfil and inputs that it cannot
        read (`ContextLengthError`: too long), `EngineError` if a vector is not finite.
        """
        options = EmbedOptions(dimensions, normalize, truncate, prompt)
        prepared = self.read(inputs, options)
        return self.finish(self._run_all(prepared), prepared, options)

    # The parts of `embed`, for callers that batch several requests

    def read(self, inputs: Sequence[Input], options: EmbedOptions) -> list[Prepared]:
        """Return the inputs as tokens; any thread may call it."""
        self._check(options)
        prompt, noun = self._prompt(options.prompt), options.noun
        prepared = within_total(
            (
                self.reader.read(index, given, noun=noun, prompt=prompt, truncate=options.truncate)
                for index, given in enumerate(inputs)
            ),
            noun,
        )
        if prompt and not self.config.pools_prompt:
            skipped = self.reader.prompt_length(prompt)
            prepared = [
                # A prompt that fills the whole limit leaves the last token to be pooled.
                Prepared(each.token_ids, each.type_ids, min(skipped, len(each) - 1))
                for each in prepared
            ]
        return prepared

    def run(self, batch: Sequence[Prepared]) -> list[Vector]:
        """Return the vectors of one batch, before the options of requests are applied."""
        token_ids, type_ids, lengths, skipped = as_arrays(batch)
        hidden = self.backbone(token_ids, lengths, type_ids)
        vectors = self.steps(pool(hidden, lengths, self.config.pooling, skipped))
        mx.eval(vectors)
        return list(np.array(vectors, dtype=np.float32))

    def finish(
        self, vectors: Sequence[Vector], prepared: Sequence[Prepared], options: EmbedOptions
    ) -> Embeddings:
        """Apply a request's options to the model's vectors; any thread may call it."""
        for index, vector in enumerate(vectors):
            if not np.isfinite(vector).all():
                raise EngineError(f"the vector of input {index} is not made of finite numbers")
        if options.dimensions is not None and options.dimensions < self.config.dimension:
            vectors = [_unit(vector[: options.dimensions]) for vector in vectors]
        elif options.normalize and not self.config.normalize:
            vectors = [_unit(vector) for vector in vectors]
        return Embeddings(tuple(vectors), tuple(len(each) for each in prepared))

    def _check(self, options: EmbedOptions) -> None:
        wanted = options.dimensions
        if wanted is not None and not 1 <= wanted <= self.config.dimension:
            raise RequestError(
                f"dimensions is {wanted}, but the model's vectors have {self.config.dimension}",
                param="dimensions",
            )
        if options.normalize is False and self.config.normalize:
            raise RequestError(
                "normalize is false, but the model's vectors always have length 1",
                param="normalize",
            )

    def _prompt(self, name: str | None) -> str:
        if name is None:
            return ""
        if name not in self.config.prompts:
            known = ", ".join(sorted(self.config.prompts)) or "none"
            raise RequestError(
                f"the model has no prompt {name[:100]!r}; it has {known}", param="prompt"
            )
        return self.config.prompts[name]


def _unit(vector: Vector) -> Vector:
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return (vector / max(length, _SHORTEST)).astype(np.float32)
