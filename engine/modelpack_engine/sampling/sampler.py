"""Sampler: draw the next token of each row from its logits, and report log-probabilities.

`Engine` owns one. It plans a step by `sampling/plan.py`, and draws by a kernel or MLX's functions.

Log-probabilities are log-softmax of the raw logits: before temperature, penalties, biases, masks
and filters, as OpenAI reports them (vLLM's `raw_logprobs`). So a token may be chosen that is not
among the most likely ones reported with it.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from modelpack_engine.core.detokenizer import ending_token_ids
from modelpack_engine.kernels import launch
from modelpack_engine.kernels.plan import vector_width
from modelpack_engine.outputs import TokenLogprob
from modelpack_engine.platform.device import Staging
from modelpack_engine.request import MAX_LOGPROBS, SamplingParams
from modelpack_engine.sampling import plan as draw
from modelpack_engine.sampling import plan as logits
from modelpack_engine.sampling.plan import (
    OUTPUT,
    Draws,
    Entry,
    Penalties,
    Plan,
    TokenHistory,
    has_penalties,
    make_plan,
    padded_rows,
    plan_draws,
)

#: Rows that are worked on at once: bounds the memory that a long chunk of a prompt takes.
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Lazy device arrays: `chosen` float32 [rows]; `top_ids` int32 and `top` float32 [rows, k].

    The most likely come first. k is MAX_LOGPROBS (or the vocabulary's size, if that is less)
    whatever was asked for, so that shapes do not vary; it is 0 if no alternatives were.
    """

    chosen: mx.array
    top_ids: mx.array
    top: mx.array

    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        """Return what has to be evaluated."""
        return self.chosen, self.top_ids, self.top

    def read(
        self, token_ids: Sequence[int], num_top: Sequence[int | None]
    ) -> list[TokenLogprob | None]:
        """Bring the first rows to the host, waiting for them.

        `token_ids` are the chosen ones and `num_top` how many alternatives each row asked for (None
        gives None). There may be fewer of them than rows: those were padding.
        """
        chosen: Any = self.chosen.tolist()
        top_ids: Any = self.top_ids.tolist()
        top: Any = self.top.tolist()
        found: list[TokenLogprob | None] = []
        for row, (token_id, wanted) in enumerate(zip(token_ids, num_top, strict=True)):
            if wanted is None:
                found.append(None)
                continue
            best = tuple(zip(top_ids[row][:wanted], top[row][:wanted], strict=True))
            found.append(TokenLogprob(token_id, chosen[row], best))
        return found


def gather_logprobs(logits: mx.array, token_ids: mx.array, num_top: int) -> Logprobs:
    """Return the log-probabilities of `token_ids` (int32 [rows]) and, if `num_top`, the highest.

    `logits` [rows, vocab_size] are the model's, of any float type. For a prompt's chunk, row i is
    the logits at position p and `token_ids[i]` the prompt's token at p + 1.
    """
    parts = [
        _gather(
            logits[start : start + _ROWS_AT_ONCE], token_ids[start : start + _ROWS_AT_ONCE], num_top
        )
        for start in range(0, logits.shape[0], _ROWS_AT_ONCE)
    ]
    if len(parts) == 1:
        return Logprobs(*parts[0])
    chosen, top_ids, top = zip(*parts, strict=True)
    return Logprobs(*(mx.concatenate(list(part)) for part in (chosen, top_ids, top)))


def _gather(
    logits: mx.array, token_ids: mx.array, num_top: int
) -> tuple[mx.array, mx.array, mx.array]:
    logits = logits.astype(mx.float32)
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = (mx.take_along_axis(logits, token_ids[:, None], axis=-1) - total)[:, 0]
    k = min(MAX_LOGPROBS, logits.shape[-1]) if num_top else 0
    ids = mx.argpartition(logits, -k, axis=-1)[:, -k:] if k else token_ids[:, None][:, :0]
    values = mx.take_along_axis(logits, ids, axis=-1)
    order = mx.argsort(-values, axis=-1)
    ids = mx.take_along_axis(ids, order, axis=-1).astype(mx.int32)
    return chosen, ids, mx.take_along_axis(values, order, axis=-1) - total


Keys = NDArray[np.uint32]

_MOST_SIMDGROUPS = 16
#: Metal has smaller inputs elsewhere.
_FEWEST = 64
#: Last bits of a float32 that are zeros in all of a type's.
_ZEROS = {mx.float32: 0, mx.float16: 13, mx.bfloat16: 16}


def choose(batch_logits: mx.array, draws: Draws, keys: Keys, staging: Staging) -> mx.array:
    """Return int32 tokens of logits [rows, vocab_size]: drawn by `draws`, or the most likely.

    `keys` are uint32 [rows drawn, 2]. A row depends on its logits, settings and key only.
    """
    if verdict(batch_logits.dtype, batch_logits.shape[-1]) is None:
        return by_kernel(batch_logits, draws, keys, staging)
    return by_functions(batch_logits, draws, keys, staging)


def by_functions(batch_logits: mx.array, draws: Draws, keys: Keys, staging: Staging) -> mx.array:
    """Return what `choose` does, by MLX's functions."""
    arrays = draws.arrays
    token_ids = mx.argmax(batch_logits, axis=-1).astype(mx.int32)
    scaled = batch_logits[arrays.rows].astype(mx.float32) / arrays.temperature
    least = None
    if arrays.log_min_p is not None or arrays.filters:
        least = mx.full((scaled.shape[0], 1), -mx.inf)
        if arrays.log_min_p is not None:
            least = scaled.max(axis=-1, keepdims=True) + arrays.log_min_p
        for f in arrays.filters:
            least[f.rows] = logits.cutoff(
                scaled[f.rows], least[f.rows], f.top_k, f.top_p, windowed=f.windowed
            )
    staged = staging.put(keys.ravel().view(np.int32))[: keys.size]
    row_keys = staged.view(mx.uint32).reshape(keys.shape)
    token_ids[arrays.rows] = draw.draw(scaled, least, row_keys)[arrays.sources]
    return token_ids


def by_kernel(batch_logits: mx.array, draws: Draws, keys: Keys, staging: Staging) -> mx.array:
    """Return what `choose` does, by the kernel."""
    rows, vocab_size = batch_logits.shape
    settings = draws.settings.copy()
    distinct = slice(draws.num_drawn)
    settings[draws.batch_rows[distinct], 4:] = keys[distinct].view(np.int32)
    vector = vector_width(batch_logits.dtype.size, vocab_size)
    simdgroups = min(_MOST_SIMDGROUPS, max(1, vocab_size // 512))
    (token_ids,) = launch.run(
        "draw",
        [batch_logits, staging.put(settings.ravel())],
        [("T", batch_logits.dtype)],
        [
            ("V", vocab_size),
            ("VEC", vector),
            ("SHIFT", _ZEROS[batch_logits.dtype]),
            ("NSG", simdgroups),
        ],
        threads=rows * simdgroups * 32,
        group=simdgroups * 32,
        shapes=[(rows,)],
        dtypes=[mx.int32],
    )
    return token_ids


@cache
def verdict(dtype: mx.Dtype, vocab_size: int) -> str | None:
    """Return None if the kernel draws what MLX's functions do, else what is off.

    The first call for logits of a type and width compiles it.
    """
    if launch.backend() == "none":
        return "there is no GPU"
    if dtype not in _ZEROS or vocab_size < _FEWEST:
        return f"there is no kernel for {vocab_size} logits in {dtype}"
    return launch.verdict(_compare, dtype, vocab_size)


def _compare(dtype: mx.Dtype, vocab_size: int) -> str | None:
    k = max(2, vocab_size // 50)
    kinds = {
        "none": SamplingParams(temperature=0),
        "all": SamplingParams(),
        "hot": SamplingParams(temperature=3.0),
        "top-k": SamplingParams(top_k=k),
        "top-p": SamplingParams(top_p=0.8),
        "min-p": SamplingParams(min_p=0.2, temperature=2.0),
        "top-k and top-p": SamplingParams(top_k=k, top_p=0.9, temperature=2.0),
        "all three": SamplingParams(top_k=2 * k, top_p=0.7, min_p=0.1, temperature=1.5),
    }
    each = 8
    entries = [Entry(params, seed, None, ()) for params in kinds.values() for seed in range(each)]
    rows = len(entries)
    draws = plan_draws(entries, rows, vocab_size)
    assert draws is not None, "all are drawn"
    some = mx.random.normal((rows, vocab_size), key=mx.random.key(23))
    some[:, ::7] = -mx.inf  # what a mask hides
    positions = np.arange(len(draws.seeds), dtype=np.uint64)
    keys, staging = draw.keys(draws.seeds, positions), Staging()
    ways = by_kernel, by_functions
    found, wanted = (np.array(way(some.astype(dtype), draws, keys, staging)) for way in ways)
    for name, at in zip(kinds, range(0, rows, each), strict=True):
        if (found[at : at + each] != wanted[at : at + each]).any():
            return f"tokens by {name} are others"
    return None


#: Stands for a token that could not be chosen: the row had NaN, infinity or no allowed token.
NO_TOKEN = -1


class SampleRow(NamedTuple):
    """A row whose next token is sampled.

    `position` is the number of tokens before it, prompt and output; `num_output` how many of them
    are output. Both count tokens in flight. `allowed` is what its mask allows: a bit per token id
    (LSB first), ids past its end are not allowed; None: any token may come.

    `assumed` is for rows of a proposal: tokens that the row takes for output, beyond those that the
    sampler knows. Whether the row's own token counts is not known yet: `accept` says so later.
    """

    seq_id: int
    position: int
    num_output: int
    allowed: bytes | None = None
    assumed: Tokens[int] | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a step sampled, as lazy device arrays.

    `token_ids` are int32 [rows], NO_TOKEN where the logits allow no choice: only that request has
    failed. `next_ids` are the same for the device, with any id in place of NO_TOKEN: the next step
    is made of these, as MLX may move the array that the host reads. `logprobs` is None if no row
    asked for them.
    """

    token_ids: mx.array
    next_ids: mx.array
    logprobs: Logprobs | None

    @classmethod
    def of(cls, token_ids: mx.array) -> Sampled:
        """Return what was sampled elsewhere."""
        return cls(token_ids, _next(token_ids), None)

    def arrays(self) -> tuple[mx.array, ...]:
        """Return what has to be evaluated."""
        logprobs = self.logprobs.arrays() if self.logprobs else ()
        return (self.token_ids, self.next_ids, *logprobs)


class Sampler:
    """Samples for the sequences that were added, in any batch made of them.

    A sequence's tokens depend on its logits, its parameters and its seed, and not on the batch. The
    draw's key is (seed, position), so that a sequence which was preempted and added again goes on
    as it would have.

    Penalties count a token from the step after the one that sampled it, whether or not the host has
    seen it: `sample` puts the count into the graph (see TokenHistory). Hence every call of `sample`
    stands for a step that is run, in the order of the calls; a step that is thrown away would leave
    its tokens counted.
    """

    def __init__(
        self,
        vocab_size: int,
        max_num_seqs: int,
        eos_token_ids: Collection[int],
        staging: Staging | None = None,
    ) -> None:
        self._staging = staging or Staging()
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(i for i in eos_token_ids if 0 <= i < vocab_size)
        self._history = TokenHistory(vocab_size, max_num_seqs)
        self._entries: dict[int, Entry] = {}
        self._least: dict[int, int] = {}  # tokens that those have to have, of whom any are wanted
        self._composition: tuple[object, ...] = ()
        self._plan = Plan(edits=None, penalties=None, draws=None, num_top=None)

    def warm_up(self, dtype: mx.Dtype) -> None:
        """Compile what draws from logits of this type, and from those that are adjusted."""
        for each in (dtype, mx.float32):
            verdict(each, self._vocab_size)

    def __contains__(self, seq_id: int) -> bool:
        """Whether a sequence was added, and not removed since."""
        return seq_id in self._entries

    def add(
        self,
        seq_id: int,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        output_token_ids: Sequence[int] = (),
        index: int = 0,
    ) -> None:
        """Make `seq_id` known: once it is admitted, and with its output when it is admitted again.

        `index` is the choice (0 … n-1): choices of one request count its seed up, so that they
        differ. Without a seed the system's randomness gives one.
        """
        assert seq_id not in self._entries, f"sequence {seq_id} was added twice"
        slot = (
            self._history.open(prompt_token_ids, output_token_ids)
            if has_penalties(params)
            else None
        )
        self._entries[seq_id] = Entry(
            params=params,
            seed=secrets.randbits(64) if params.seed is None else params.seed + index,
            slot=slot,
            ending_token_ids=tuple(sorted(ending_token_ids(params, self._eos_token_ids))),
        )
        if params.min_tokens:
            self._least[seq_id] = params.min_tokens

    def remove(self, seq_id: int) -> None:
        """Forget `seq_id`: it ended or was preempted. A step in flight may still hold it."""
        entry = self._entries.pop(seq_id)
        self._least.pop(seq_id, None)
        if entry.slot is not None:
            self._history.close(entry.slot)
        self._composition = ()

    def accept(self, seq_id: int, token_ids: Sequence[int]) -> None:
        """Count tokens of rows with assumptions, once it is known that they are output."""
        slot = self._entries[seq_id].slot
        if slot is not None and token_ids:
            amounts = mx.full((len(token_ids),), OUTPUT, mx.int32)
            slots = mx.full((len(token_ids),), slot, mx.int32)
            self._history.append(slots, mx.array(list(token_ids), mx.int32), amounts)

    def sample(self, batch_logits: mx.array, seqs: Sequence[SampleRow]) -> Sampled:
        """Return the next token of `seqs`, whose logits are the first rows of `batch_logits`.

        `batch_logits` is [rows, vocab_size] of any float type; rows after those of `seqs` are
        padding, whose tokens mean nothing. Nothing is evaluated.
        """
        plan = self._planned(seqs, batch_logits.shape[0])
        allowed = {row: seq.allowed for row, seq in enumerate(seqs) if seq.allowed is not None}
        chosen_from = self._adjust(batch_logits, plan, allowed, seqs)
        if (draws := plan.draws) is None:
            token_ids = mx.argmax(chosen_from, axis=-1).astype(mx.int32)
        else:
            positions = np.array([seq.position for seq in seqs], dtype=np.uint64)
            keys = draw.keys(draws.seeds, positions[draws.batch_rows])
            token_ids = choose(chosen_from, draws, keys, self._staging)
        token_ids, next_ids = _usable(token_ids, chosen_from.max(axis=-1))
        if chosen_from is not batch_logits:  # a mask may have hidden the NaN
            token_ids, next_ids = _usable(token_ids, batch_logits.max(axis=-1))
        if (penalties := plan.penalties) is not None:
            self._history.append(penalties.slots, next_ids[penalties.rows], penalties.increments)
        if plan.num_top is None:
            return Sampled(token_ids, next_ids, None)
        logprobs = gather_logprobs(batch_logits, token_ids, plan.num_top)
        return Sampled(token_ids, next_ids, logprobs)

    def _planned(self, seqs: Sequence[SampleRow], num_rows: int) -> Plan:
        """Return the plan, which is uploaded anew only when the batch's composition changes."""
        least = self._least
        ends_masked = [seq.num_output < least.get(seq.seq_id, 0) for seq in seqs] if least else []
        counted = [seq.assumed is None for seq in seqs]
        composition = num_rows, [seq.seq_id for seq in seqs], ends_masked, counted
        if composition != self._composition:
            entries = [self._entries[seq.seq_id] for seq in seqs]
            masked = ends_masked or [False] * len(seqs)
            self._plan = make_plan(entries, masked, counted, num_rows, self._vocab_size)
            self._composition = composition
        return self._plan

    def _adjust(
        self,
        batch_logits: mx.array,
        plan: Plan,
        allowed: dict[int, bytes],
        seqs: Sequence[SampleRow],
    ) -> mx.array:
        """Return the logits after biases, masks and penalties: the same array if there are none."""
        if plan.keeps_logits and not allowed:
            return batch_logits
        adjusted = batch_logits.astype(mx.float32)
        if (edits := plan.edits) is not None:
            adjusted = adjusted.at[edits.rows, edits.token_ids].add(edits.amounts)
        if allowed:
            rows = padded_rows(list(allowed), batch_logits.shape[0])
            packed = self._packed(allowed, rows.tolist())
            index = mx.array(rows)
            adjusted[index] = logits.mask(adjusted[index], packed)
        if (penalties := plan.penalties) is not None:
            adjusted[penalties.rows] = logits.penalise(
                adjusted[penalties.rows],
                self._counts(penalties, seqs),
                penalties.repetition,
                penalties.presence,
                penalties.frequency,
            )
        return adjusted

    def _counts(self, penalties: Penalties, seqs: Sequence[SampleRow]) -> mx.array:
        """Return the counts of penalised rows, with what they assume."""
        counts = self._history.counts(penalties.slots)
        assumed = [
            (index, token_id)
            for index, row in enumerate(penalties.batch_rows)
            for token_id in seqs[row].assumed or ()
        ]
        if not assumed:
            return counts
        rows, token_ids = (mx.array(column, mx.int32) for column in zip(*assumed, strict=True))
        return counts.at[rows, token_ids].add(OUTPUT)

    def _packed(self, allowed: dict[int, bytes], rows: Sequence[int]) -> mx.array:
        """Return a row of bits for each of `rows`; ids past the end of a mask are not allowed."""
        width = -(-self._vocab_size // 8)
        data = b"".join(allowed[row][:width].ljust(width, b"\0") for row in rows)
        return mx.array(np.frombuffer(data, dtype=np.uint8).reshape(len(rows), width))


# Compiled, since numbers would be arrays in the host's memory, which kernels read slowly.


@partial(mx.compile, shapeless=True)
def _usable(token_ids: mx.array, maxima: mx.array) -> tuple[mx.array, mx.array]:
    """Return `token_ids`, NO_TOKEN where maxima are not finite: of NaN (max keeps it), all -inf.

    And the same as ids of a next step.
    """
    usable = mx.where(mx.isfinite(maxima), token_ids, NO_TOKEN)
    return usable, mx.maximum(usable, 0)


@partial(mx.compile, shapeless=True)
def _next(token_ids: mx.array) -> mx.array:
    return mx.maximum(token_ids, 0)
