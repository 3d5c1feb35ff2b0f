"""Plan: what a batch of given composition needs at each stage, as small arrays on the device.

Each stage works on the rows that ask for it. Their number is padded to a power of two by repeating
the first of them, so that shapes stay few; what is written back for a repeated row is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from modelpack_engine.sampling import draw, logits
from modelpack_engine.sampling.history import OUTPUT
from modelpack_engine.sampling_params import SamplingParams

#: Temperatures below this are greedy: dividing by them would overflow (vLLM's limit).
GREEDY_BELOW = 1e-5


@dataclass(frozen=True, slots=True)
class Entry:
    """What the sampler knows of a sequence: `slot` is its history's, if it has penalties."""

    params: SamplingParams
    seed: int
    slot: int | None
    ending_token_ids: tuple[int, ...]

    @property
    def is_random(self) -> bool:
        """Whether tokens are drawn, rather than the most likely taken."""
        return self.params.temperature >= GREEDY_BELOW


def has_penalties(params: SamplingParams) -> bool:
    """Whether any of the three penalties does something."""
    return (
        params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
    )


@dataclass(frozen=True, slots=True)
class Edits:
    """Amounts to add to single logits: biases, and -inf for ends that come too early."""

    rows: mx.array
    token_ids: mx.array
    amounts: mx.array


@dataclass(frozen=True, slots=True)
class Penalties:
    """Rows with penalties, their history slots, and the penalties (float32 [rows, 1]).

    `batch_rows` are the rows on the host; `increments` what their tokens add to the history.
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
    """Rows, among those that are drawn, that need a sort."""

    rows: mx.array
    top_k: mx.array
    top_p: mx.array
    windowed: bool


@dataclass(frozen=True, slots=True)
class DrawArrays:
    """What MLX's functions need to draw: temperature and log of min-p are float32 [rows, 1].

    `sources` are where in `rows` to find the result of each: a repeated row is drawn without its
    filters, which are applied once.
    """

    rows: mx.array
    sources: mx.array
    temperature: mx.array
    log_min_p: mx.array | None
    filters: tuple[Filter, ...]


@dataclass(frozen=True)
class Draws:
    """Rows whose token is drawn, on the host: `batch_rows`, the first `num_drawn` of them distinct.

    `settings` are of all rows of the batch, int32 [rows, 6]: floats' bits (temperature, 0 where
    nothing is drawn; log of min-p; top-p; top-k, the vocabulary's size for all), and two for a key.
    """

    batch_rows: NDArray[np.int32]
    num_drawn: int
    seeds: NDArray[np.uint64]
    settings: NDArray[np.int32]
    vocab_size: int

    @cached_property
    def arrays(self) -> DrawArrays:
        """The same for MLX's functions."""
        numbers = self.settings[self.batch_rows, :4].view(np.float32)
        temperature, log_min_p, top_p, top_k = (numbers[:, [column]] for column in range(4))
        is_windowed = (top_k <= logits.WINDOW) & (self.vocab_size > logits.WINDOW)
        is_sorted = ((top_k < self.vocab_size) | (top_p < 1)) & ~is_windowed
        filters = []
        for chosen, windowed in ((is_windowed, True), (is_sorted, False)):
            if wanted := np.flatnonzero(chosen[: self.num_drawn]).tolist():
                rows = padded_rows(wanted, len(numbers))
                k = mx.array(top_k[rows].astype(np.int32))
                filters.append(Filter(mx.array(rows), k, mx.array(top_p[rows]), windowed))
        sources = [*range(self.num_drawn), *[0] * (len(numbers) - self.num_drawn)]
        return DrawArrays(
            rows=mx.array(self.batch_rows),
            sources=mx.array(sources, dtype=mx.int32),
            temperature=mx.array(temperature),
            log_min_p=mx.array(log_min_p) if np.isfinite(log_min_p).any() else None,
            filters=tuple(filters),
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """The stages of a step; None where no row asks for the stage."""

    edits: Edits | None
    penalties: Penalties | None
    draws: Draws | None
    num_top: int | None

    @property
    def keeps_logits(self) -> bool:
        """Whether tokens are chosen from the logits as they are."""
        return self.edits is None and self.penalties is None


def make_plan(
    entries: Sequence[Entry],
    ends_masked: Sequence[bool],
    counted: Sequence[bool],
    num_rows: int,
    vocab_size: int,
) -> Plan:
    """Plan for `entries`, the first of `num_rows` rows; `ends_masked` says who may not end yet, and
    `counted` whose token is sure to be output."""
    tops = [e.params.logprobs for e in entries if e.params.logprobs is not None]
    return Plan(
        edits=_edits(entries, ends_masked),
        penalties=_penalties(entries, counted, num_rows),
        draws=plan_draws(entries, num_rows, vocab_size),
        num_top=max(tops, default=None),
    )


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
    wanted = [row for row, entry in enumerate(entries) if entry.is_random]
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
        seeds=draw.seeds_of([entries[row].seed for row in rows]),
        settings=settings,
        vocab_size=vocab_size,
    )


def _column(values: Iterable[float]) -> mx.array:
    return mx.array(np.array(list(values), dtype=np.float32)[:, None])
