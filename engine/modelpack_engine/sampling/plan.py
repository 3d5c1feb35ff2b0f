"""Plan: the stages of sampling that the rows of a step need, and the functions that run them.

Random draws depend only on a request's seed and the token's position. A token is drawn by the
Gumbel-max trick: each token of the vocabulary gets its own noise, and the largest sum of logit and
noise wins. Logits differ in their last bits between batches of different shapes. Since the noise
belongs to a token, and not to its rank or to a point of the cumulative distribution, this almost
never changes the draw.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from modelpack_engine.request import SamplingParams

_LEAST = 2.0**-33  # below the least positive uniform number, 2 ** -32


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits of 64-bit numbers, one to one: SplitMix64 (doi:10.1145/2660193.2660195)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def seeds_of(numbers: list[int]) -> NDArray[np.uint64]:
    """Reduce integers to 64 bits: -1 and 2 ** 64 - 1 are the same seed."""
    return np.array([number & 0xFFFFFFFFFFFFFFFF for number in numbers], dtype=np.uint64)


def draw_keys(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Return the random key of each draw, uint32 [rows, 2], from its seed and its position.

    The seed is mixed first: otherwise seed 1 at position 2 would equal seed 2 at position 1.
    """
    folded = mix(mix(seeds) + positions)
    return np.stack([folded >> np.uint64(32), folded], axis=-1).astype(np.uint32)


def gumbel(row_keys: mx.array, vocab_size: int) -> mx.array:
    """Return Gumbel noise, float32 [rows, vocab_size]; a row depends only on its key.

    It uses -log1p(-u) rather than -log(u): the winning noise comes from the smallest exponentials,
    and float32 is far more precise near 0 than near 1.
    """

    def uniform(key: mx.array) -> mx.array:
        return mx.random.uniform(shape=(vocab_size,), key=key)

    u = mx.maximum(mx.vmap(uniform)(row_keys), _LEAST)
    return -mx.log(-mx.log1p(-u))


def draw(logits: mx.array, least: mx.array | None, row_keys: mx.array) -> mx.array:
    """Draw a token for each row, by softmax over the logits not below `least` ([rows, 1])."""
    if least is not None:
        logits = mx.where(logits >= least, logits, -mx.inf)
    return mx.argmax(logits + gumbel(row_keys, logits.shape[-1]), axis=-1).astype(mx.int32)


#: Added for each output token; the lowest bit is set if the prompt has the token.
OUTPUT = 2

_FIRST_CAPACITY = 8


class TokenHistory:
    """Token counts of sequences with penalties: a row int32 [vocab_size] for each.

    A count is twice the number of occurrences in the output, plus one if the prompt has the token.
    Rows take `vocab_size` * 4 bytes each. They are allocated with the first penalised sequence, in
    powers of two, and reused.

    Tokens in flight are counted: `append` extends the graph that the next `counts` reads, so step
    N + 1 counts the token that step N samples, before the host has read it. Evaluating the tokens
    of a step also evaluates the counts; at most one `append` is pending. The counts are updated in
    place if each step is evaluated before the next one is submitted.
    """

    def __init__(self, vocab_size: int, max_num_seqs: int) -> None:
        self._vocab_size = vocab_size
        self._first_capacity = min(_FIRST_CAPACITY, max_num_seqs)
        self._counts: mx.array | None = None
        self._free: list[int] = []

    def open(self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int]) -> int:
        """Return a slot with the counts of these tokens; free it by `close`."""
        if not self._free:
            self._grow()
        assert self._counts is not None
        slot = self._free.pop()
        self._counts[slot] = mx.array(self._count(prompt_token_ids, output_token_ids))
        return slot

    def close(self, slot: int) -> None:
        """Free a slot."""
        self._free.append(slot)

    def counts(self, slots: mx.array) -> mx.array:
        """Return the counts of `slots` (int32 [rows]) as int32 [rows, vocab_size]."""
        assert self._counts is not None, "no slot is open"
        return self._counts[slots]

    def append(self, slots: mx.array, token_ids: mx.array, amounts: mx.array) -> None:
        """Add `amounts` to one token of each slot (all int32 [rows]): OUTPUT, or 0 for padding."""
        assert self._counts is not None, "no slot is open"
        self._counts = self._counts.at[slots, token_ids].add(amounts)

    def _count(self, prompt: Sequence[int], output: Sequence[int]) -> NDArray[np.int32]:
        row = np.zeros(self._vocab_size, dtype=np.int32)
        np.add.at(row, np.asarray(output, dtype=np.int64), OUTPUT)
        row[np.asarray(prompt, dtype=np.int64)] |= 1
        return row

    def _grow(self) -> None:
        more = self._first_capacity if self._counts is None else self._counts.shape[0]
        empty = mx.zeros((more, self._vocab_size), dtype=mx.int32)
        if self._counts is None:
            self._counts, first = empty, 0
        else:
            first = self._counts.shape[0]
            self._counts = mx.concatenate([self._counts, empty])
        self._free.extend(range(first + more - 1, first - 1, -1))


#: For a top-k up to this, only this many of the most likely tokens are sorted.
WINDOW = 1024


def apply_mask(logits: mx.array, allowed: mx.array) -> mx.array:
    """Set the logits of tokens that are not `allowed` to -inf.

    `allowed` is uint8 [rows, ceil(vocab_size / 8)], a bit for each token, least significant first.
    """
    vocab_size = logits.shape[-1]
    bits = (allowed[:, :, None] >> mx.arange(8, dtype=mx.uint8)) & 1
    keep = bits.reshape(allowed.shape[0], -1)[:, :vocab_size]
    return mx.where(keep, logits, -mx.inf)


def penalise(
    logits: mx.array,
    counts: mx.array,
    repetition: mx.array,
    presence: mx.array,
    frequency: mx.array,
) -> mx.array:
    """Lower the logits of tokens that occurred; the penalties are float32 [rows, 1].

    `counts` is TokenHistory's. Repetition (CTRL, arXiv:1909.05858) counts prompt and output;
    presence and frequency (OpenAI) count the output only. The order is vLLM's.
    """
    repeated = mx.where(logits > 0, logits / repetition, logits * repetition)
    logits = mx.where(counts > 0, repeated, logits)
    outputs = (counts >> 1).astype(mx.float32)
    return logits - frequency * outputs - presence * (outputs > 0)


def cutoff(
    logits: mx.array, floor: mx.array, top_k: mx.array, top_p: mx.array, *, windowed: bool
) -> mx.array:
    """Return the lowest logit that top-k and top-p keep, float32 [rows, 1], by one sort.

    `floor` (float32) is the lowest logit that min-p keeps, `top_k` is int32 from 1 to vocab_size,
    `top_p` float32; all are [rows, 1]. Top-p keeps the smallest set of the most likely tokens that
    has the share `top_p` of the probability of all tokens that top-k and min-p keep. Tokens whose
    logit equals the lowest one are kept as well.

    Set `windowed` only if every top-k is at most WINDOW.
    """
    if windowed:
        logits = mx.topk(logits, WINDOW, axis=-1)
    ascending = mx.sort(logits, axis=-1)
    rank = mx.arange(ascending.shape[-1] - 1, -1, -1)
    kept = (rank < top_k) & (ascending >= floor)
    mass = mx.where(kept, mx.exp(ascending - ascending[:, -1:]), 0)
    above = mx.cumsum(mass, axis=-1, reverse=True, inclusive=False)
    total = above[:, :1] + mass[:, :1]
    kept = kept & ((above < top_p * total) | (top_p >= 1))
    return mx.where(kept, ascending, mx.inf).min(axis=-1, keepdims=True)


#: Temperatures below this are greedy: dividing by them would overflow (vLLM's limit).
GREEDY_BELOW = 1e-5


@dataclass(frozen=True, slots=True)
class Entry:
    """The sampler's state of a sequence; `slot` is its token history, if it has penalties."""

    params: SamplingParams
    seed: int
    slot: int | None
    ending_token_ids: tuple[int, ...]


def has_penalties(params: SamplingParams) -> bool:
    """Return whether any of the three penalties has an effect."""
    return (
        params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
    )


def is_plain(params: SamplingParams) -> bool:
    """Return whether the most likely token is chosen from the model's own logits."""
    return (
        params.temperature < GREEDY_BELOW
        and params.logprobs is None
        and not params.logit_bias
        and not params.min_tokens
        and not has_penalties(params)
    )


@dataclass(frozen=True, slots=True)
class Edits:
    """Amounts to add to single logits: biases, and -inf for end tokens before `min_tokens`."""

    rows: mx.array
    token_ids: mx.array
    amounts: mx.array


@dataclass(frozen=True, slots=True)
class Penalties:
    """Rows with penalties, their history slots, and the penalties (float32 [rows, 1]).

    `batch_rows` are the rows on the host; `increments` are added to the history for their tokens.
    """

    rows: mx.array
    batch_rows: NDArray[np.int32]
    slots: mx.array
    repetition: mx.array
    presence: mx.array
    frequency: mx.array
    increments: mx.array


@dataclass(frozen=True, slots=True)
class Filter:
    """The drawn rows whose logits must be sorted (None: all), with their top-k and top-p."""

    rows: mx.array | None
    top_k: mx.array
    top_p: mx.array
    windowed: bool


@dataclass(frozen=True, slots=True)
class DrawArrays:
    """The inputs of MLX's functions; temperature and log of min-p are float32 [rows, 1].

    `sources` are the indices in `rows` of the results to use: filters apply only to the first
    occurrence of a row, and rows repeated as padding are drawn without them. Both are None if all
    rows are drawn.
    """

    rows: mx.array | None
    sources: mx.array | None
    temperature: mx.array
    log_min_p: mx.array | None
    filters: tuple[Filter, ...]


@dataclass(frozen=True)
class Draws:
    """The rows whose token is drawn: `batch_rows`; the first `num_drawn` of them are distinct.

    `settings` has all rows of the batch, int32 [rows, 6]: the bits of four floats (temperature, 0
    if no token is drawn; log of min-p; top-p; top-k, or the vocabulary's size), and a key of two.
    """

    batch_rows: NDArray[np.int32]
    num_drawn: int
    seeds: NDArray[np.uint64]
    settings: NDArray[np.int32]
    vocab_size: int

    @cached_property
    def arrays(self) -> DrawArrays:
        """The inputs of MLX's functions for these draws."""
        numbers = self.settings[self.batch_rows, :4].view(np.float32)
        temperature, log_min_p, top_p, top_k = (numbers[:, [column]] for column in range(4))
        is_windowed = (top_k <= WINDOW) & (self.vocab_size > WINDOW)
        is_sorted = ((top_k < self.vocab_size) | (top_p < 1)) & ~is_windowed
        filters = []
        for chosen, windowed in ((is_windowed, True), (is_sorted, False)):
            if wanted := np.flatnonzero(chosen[: self.num_drawn]).tolist():
                rows = padded_rows(wanted, len(numbers))
                k = mx.array(top_k[rows].astype(np.int32))
                some = None if _is_range(rows, len(numbers)) else mx.array(rows)
                filters.append(Filter(some, k, mx.array(top_p[rows]), windowed))
        sources = [*range(self.num_drawn), *[0] * (len(numbers) - self.num_drawn)]
        every = _is_range(self.batch_rows, len(self.settings))
        return DrawArrays(
            rows=None if every else mx.array(self.batch_rows),
            sources=None if every else mx.array(sources, dtype=mx.int32),
            temperature=mx.array(temperature),
            log_min_p=mx.array(log_min_p) if np.isfinite(log_min_p).any() else None,
            filters=tuple(filters),
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """The sampling stages of a step; None for a stage that no row needs."""

    edits: Edits | None
    penalties: Penalties | None
    draws: Draws | None
    num_top: int | None


#: The plan of rows that are all plain.
PLAIN = Plan(edits=None, penalties=None, draws=None, num_top=None)


def make_plan(
    entries: Sequence[Entry],
    ends_masked: Sequence[bool],
    counted: Sequence[bool],
    num_rows: int,
    vocab_size: int,
) -> Plan:
    """Plan the stages for `entries`, the first of `num_rows` rows.

    `ends_masked` marks rows that may not end yet, `counted` rows whose token will be output.
    """
    tops = [e.params.logprobs for e in entries if e.params.logprobs is not None]
    return Plan(
        edits=_edits(entries, ends_masked),
        penalties=_penalties(entries, counted, num_rows),
        draws=plan_draws(entries, num_rows, vocab_size),
        num_top=max(tops, default=None),
    )


def _is_range(rows: NDArray[np.int32], count: int) -> bool:
    return len(rows) == count and bool((rows == np.arange(count)).all())


def padded_rows(rows: list[int], num_rows: int) -> NDArray[np.int32]:
    """Pad to a power of two, or to all `num_rows`, by repeating the first row."""
    size = min(1 << (len(rows) - 1).bit_length(), num_rows)
    return np.array(rows + rows[:1] * (size - len(rows)), dtype=np.int32)


def _edits(entries: Sequence[Entry], ends_masked: Sequence[bool]) -> Edits | None:
    edits: list[tuple[int, int, float]] = []
    for row, (entry, masked) in enumerate(zip(entries, ends_masked, strict=True)):
        edits += ((row, token_id, bias) for token_id, bias in entry.params.logit_bias.items())
        if masked:
            edits += ((row, token_id, -np.inf) for token_id in entry.ending_token_ids)
    if not edits:
        return None
    edits += [(0, 0, 0.0)] * ((1 << (len(edits) - 1).bit_length()) - len(edits))
    rows, token_ids, amounts = zip(*edits, strict=True)
    return Edits(
        rows=mx.array(rows, dtype=mx.int32),
        token_ids=mx.array(token_ids, dtype=mx.int32),
        amounts=mx.array(amounts, dtype=mx.float32),
    )


def _penalties(
    entries: Sequence[Entry], counted: Sequence[bool], num_rows: int
) -> Penalties | None:
    wanted = [row for row, entry in enumerate(entries) if entry.slot is not None]
    if not wanted:
        return None
    rows = padded_rows(wanted, num_rows)
    params = [entries[row].params for row in rows]
    slots = np.array([entries[row].slot for row in rows], dtype=np.int32)
    sure = [counted[row] for row in wanted] + [False] * (len(rows) - len(wanted))
    increments = np.where(sure, OUTPUT, 0).astype(np.int32)
    return Penalties(
        rows=mx.array(rows),
        batch_rows=rows,
        slots=mx.array(slots),
        repetition=_column(p.repetition_penalty for p in params),
        presence=_column(p.presence_penalty for p in params),
        frequency=_column(p.frequency_penalty for p in params),
        increments=mx.array(increments),
    )


def plan_draws(entries: Sequence[Entry], num_rows: int, vocab_size: int) -> Draws | None:
    """Plan the draws of `entries`, the first of `num_rows` rows; None if no row is drawn."""
    wanted = [row for row, entry in enumerate(entries) if entry.params.temperature >= GREEDY_BELOW]
    if not wanted:
        return None
    rows = padded_rows(wanted, num_rows)
    params = [entries[row].params for row in rows]
    with np.errstate(divide="ignore"):
        log_min_p = np.log([p.min_p for p in params])
    numbers = [
        (p.temperature, least, p.top_p, min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size)
        for p, least in zip(params, log_min_p, strict=True)
    ]
    settings = np.zeros((num_rows, 6), dtype=np.int32)
    settings[rows, :4] = np.array(numbers, dtype=np.float32).view(np.int32)
    return Draws(
        batch_rows=rows,
        num_drawn=len(wanted),
        seeds=seeds_of([entries[row].seed for row in rows]),
        settings=settings,
        vocab_size=vocab_size,
    )


def _column(values: Iterable[float]) -> mx.array:
    return mx.array(np.array(list(values), dtype=np.float32)[:, None])
