"""A request to an embedding model: options, inputs as tokens, batches by length, and results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelpack_engine.errors import ContextLengthError, RequestError
from modelpack_engine.models.tokenizer import TextTooLongError, Tokenizer

#: Texts of up to this many tokens take about the same time, whatever their length.
_SHORT = 16


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """The most texts of a batch, and its most tokens, padding included."""

    max_texts: int = 64
    max_tokens: int = 8192


def next_batch(lengths: Sequence[int], limits: BatchLimits) -> list[int]:
    """Return the indices of the next batch: the first text, and those nearest to it in length.

    The first text always runs, so none waits forever. At most half of each row is padding.
    """
    first = lengths[0]
    near = sorted(range(1, len(lengths)), key=lambda at: (abs(lengths[at] - first), at))
    batch, shortest, longest = [0], first, first
    for place in near:
        shortest, longest = min(shortest, lengths[place]), max(longest, lengths[place])
        if not _run_together(shortest, longest, len(batch) + 1, limits):
            break
        batch.append(place)
    return batch


def split_batches(lengths: Sequence[int], limits: BatchLimits) -> list[list[int]]:
    """Return all indices in batches, the longest texts first."""
    batches: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        if batches:
            batch = batches[-1]
            if _run_together(lengths[place], lengths[batch[0]], len(batch) + 1, limits):
                batch.append(place)
                continue
        batches.append([place])
    return batches


def _run_together(shortest: int, longest: int, count: int, limits: BatchLimits) -> bool:
    if count > limits.max_texts or longest * count > limits.max_tokens:
        return False
    return longest <= max(2 * shortest, _SHORT)


#: A text, or its token ids, which are used unchanged.
Input = str | Sequence[int]

#: The most tokens of all inputs of a request.
MAX_REQUEST_TOKENS = 2048 * 2048


@dataclass(frozen=True, slots=True)
class Prepared:
    """Token ids with their types; the first `skipped` are a prompt that pooling leaves out."""

    token_ids: tuple[int, ...]
    type_ids: tuple[int, ...]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class InputReader:
    """Turns inputs into tokens. Thread-safe; makes no call to MLX.

    `vocab_size` and `num_types` are the rows of the model's tables, which MLX reads past the end
    without an error. `num_types` is 0 for a model without token types.
    """

    tokenizer: Tokenizer
    vocab_size: int
    max_length: int
    lowers_text: bool = False
    num_types: int = 0

    def read(
        self,
        index: int,
        given: Input,
        *,
        noun: str = "input",
        prompt: str = "",
        truncate: bool = False,
    ) -> Prepared:
        """Return the tokens of input number `index`; `prompt` is put before a text.

        Errors call the input `noun`, which is also their `param`, and contain the index. Raises
        `RequestError` for an empty input, and `ContextLengthError` for one that is longer than
        `max_length`, unless `truncate` cuts it.
        """
        what = f"{noun} {index}"
        if isinstance(given, str):
            if not given:
                raise RequestError(f"{what} is empty", param=noun)
            self._check_text(what, given, noun, truncate)
            ids, types = self._encode(prompt + given, None, truncate)
        else:
            ids = list(given[: self.max_length] if truncate else given)
            types = [0] * len(ids)
        return self._prepared(what, ids, types, noun)

    def read_pair(
        self, index: int, query: str, document: str, *, truncate: bool = False
    ) -> Prepared:
        """Return the tokens of a pair, as `read` does; `truncate` cuts the longer text."""
        for what, text in (("the query", query), (f"document {index}", document)):
            self._check_text(what, text, "documents", truncate)
        ids, types = self._encode(query, document, truncate)
        return self._prepared(f"the query with document {index}", ids, types, "documents")

    def prompt_length(self, prompt: str) -> int:
        """Return the number of tokens that a prompt adds at the beginning of a text."""
        ids, _ = self._encode(prompt, None, False)
        return len(ids) - (ids[-1] in self.tokenizer.special_token_ids if ids else 0)

    def _encode(self, text: str, pair: str | None, truncate: bool) -> tuple[list[int], list[int]]:
        if self.lowers_text:
            text, pair = text.lower(), pair.lower() if pair is not None else None
        limit = self.max_length if truncate else None
        if truncate:  # the tokenizer would cut off the rest
            most = self.tokenizer.max_text_bytes(self.max_length)
            text, pair = text[:most], pair[:most] if pair is not None else None
        return self.tokenizer.encode_typed(text, pair, max_length=limit)

    def _check_text(self, what: str, text: str, param: str, truncate: bool) -> None:
        """Raise `ContextLengthError` for a text that is too long to be tokenised at all."""
        if truncate:
            return
        try:
            self.tokenizer.check_length(text, self.max_length)
        except TextTooLongError as error:
            raise self._too_long(what, f"at least {error.at_least}", param) from None

    def _prepared(self, what: str, ids: list[int], types: list[int], param: str) -> Prepared:
        """Return the input; raise `RequestError` for an id or type that the model does not have."""
        if not ids:
            raise RequestError(f"{what} has no tokens", param=param)
        if len(ids) > self.max_length:
            raise self._too_long(what, str(len(ids)), param)
        if self.num_types <= 1:
            types = [0] * len(ids)
        for noun, values, table, limit in (
            ("token", ids, "vocabulary", self.vocab_size),
            ("token type", types, "model", max(1, self.num_types)),
        ):
            wrong = next((value for value in values if not 0 <= value < limit), None)
            if wrong is not None:
                raise RequestError(
                    f"{what} contains the {noun} {wrong}, but the {table} has {limit}", param=param
                )
        return Prepared(tuple(ids), tuple(types))

    def _too_long(self, what: str, count: str, param: str) -> ContextLengthError:
        return ContextLengthError(
            f"{what} has {count} tokens, but this model's maximum context length is "
            f"{self.max_length} tokens",
            param=param,
            hint="split the text, or ask for it to be truncated",
        )


def within_total(inputs: Iterable[Prepared], param: str) -> list[Prepared]:
    """Return the inputs; raise `ContextLengthError` once they have too many tokens together."""
    prepared, total = [], 0
    for each in inputs:
        prepared.append(each)
        total += len(each)
        if total > MAX_REQUEST_TOKENS:
            raise ContextLengthError(
                f"the inputs have more than {MAX_REQUEST_TOKENS} tokens together",
                param=param,
                hint="send them in several requests",
            )
    return prepared


#: float32, one dimension.
Vector = NDArray[np.float32]

#: A query and a document.
Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The vectors in the order of the inputs, and how many tokens each of these had."""

    vectors: tuple[Vector, ...]
    token_counts: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """The tokens of all inputs."""
        return sum(self.token_counts)


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """The options of a request for vectors.

    `dimensions` keeps only the first numbers of each vector, and scales it to length 1 again; it is
    for models trained for that (Matryoshka). `normalize` None means the default of the model.
    `truncate` cuts inputs that are too long, which are errors otherwise. `prompt` is the name of
    one of the model's prompts. `noun` is the field of the request with the inputs, for errors.
    """

    dimensions: int | None = None
    normalize: bool | None = None
    truncate: bool = False
    prompt: str | None = None
    noun: str = "input"


@dataclass(frozen=True, slots=True)
class Scores:
    """One number for each pair, the higher the better, and how many tokens were read for each."""

    values: tuple[float, ...]
    token_counts: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """The tokens of all pairs."""
        return sum(self.token_counts)


def sigmoid(logit: float) -> float:
    """Return 1 / (1 + exp(-logit)), without overflow."""
    return float(0.5 * (1.0 + np.tanh(0.5 * logit)))
