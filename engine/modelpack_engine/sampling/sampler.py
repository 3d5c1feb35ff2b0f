"""Sampler: draw the next token of each row from its logits, and report log-probabilities.

`Engine` owns one. `sampling/plan.py` has the stages of a step; tokens are drawn by a kernel or by
MLX's functions.

Log-probabilities are the log-softmax of the raw logits: before temperature, penalties, biases,
masks and filters, as OpenAI reports them (vLLM's `raw_logprobs`). So the chosen token may not be
among the most likely ones reported with it.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from modelpack_engine.core.detokenizer import ending_token_ids
from modelpack_engine.kernels import launch
from modelpack_engine.kernels.plan import logit_simdgroups, vector_width
from modelpack_engine.outputs import TokenLogprob
from modelpack_engine.platform.device import Staging
from modelpack_engine.request import MAX_LOGPROBS, SamplingParams
from modelpack_engine.sampling.delivery import Delivery, Outbox
from modelpack_engine.sampling.plan import (
    OUTPUT,
    PLAIN,
    Draws,
    Entry,
    Penalties,
    Plan,
    TokenHistory,
    apply_mask,
    cutoff,
    draw,
    draw_keys,
    has_penalties,
    is_plain,
    make_plan,
    padded_rows,
    penalise,
    plan_draws,
)

#: The log-probability of tokens that a model never generates, as in vLLM: JSON has no infinity.
LEAST_LOGPROB = -9999.0

#: Rows processed at once, which bounds the memory for a long chunk of a prompt.
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Lazy device arrays: `chosen` float32 [rows]; `top_ids` int32 and `top` float32 [rows, k].

    The most likely come first. To keep shapes constant, k is MAX_LOGPROBS (or the vocabulary's
    size, if that is less) for any number of requested alternatives; it is 0 without alternatives.
    """

    chosen: mx.array
    top_ids: mx.array
    top: mx.array

    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        """Return the arrays to evaluate."""
        return self.chosen, self.top_ids, self.top

    def read(
        self, token_ids: Sequence[int], num_top: Sequence[int | None]
    ) -> list[TokenLogprob | None]:
        """Wait for the first rows and return their log-probabilities.

        `token_ids` are the chosen tokens and `num_top` the requested alternatives of each row (None
        for no log-probabilities). Rows after these are padding.
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

    `logits` [rows, vocab_size] are the model's, of any float type. For a chunk of a prompt, row i
    has the logits at position p, and `token_ids[i]` is the prompt's token at position p + 1.
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
    chosen = mx.maximum(chosen, LEAST_LOGPROB)
    k = min(MAX_LOGPROBS, logits.shape[-1]) if num_top else 0
    ids = mx.argpartition(logits, -k, axis=-1)[:, -k:] if k else token_ids[:, None][:, :0]
    values = mx.take_along_axis(logits, ids, axis=-1)
    order = mx.argsort(-values, axis=-1)
    ids = mx.take_along_axis(ids, order, axis=-1).astype(mx.int32)
    top = mx.take_along_axis(values, order, axis=-1) - total
    return chosen, ids, mx.maximum(top, LEAST_LOGPROB)


Keys = NDArray[np.uint32]

#: The kernel needs at least this many logits: Metal puts smaller inputs in another address space.
_FEWEST = 64
#: The number of last bits of a float32 that are always zero for values of a type.
_ZEROS = {mx.float32: 0, mx.float16: 13, mx.bfloat16: 16}


def by_functions(batch_logits: mx.array, draws: Draws, keys: Keys, staging: Staging) -> mx.array:
    """Return int32 tokens of logits [rows, vocab_size]: drawn by `draws`, or the most likely.

    `keys` are uint32 [rows drawn, 2]. A token depends only on its row's logits, settings and key.
    """
    arrays = draws.arrays
    drawn = batch_logits if arrays.rows is None else batch_logits[arrays.rows]
    scaled = drawn.astype(mx.float32) / arrays.temperature
    least = None
    if arrays.log_min_p is not None or arrays.filters:
        least = mx.full((scaled.shape[0], 1), -mx.inf)
        if arrays.log_min_p is not None:
            least = scaled.max(axis=-1, keepdims=True) + arrays.log_min_p
        for f in arrays.filters:
            if f.rows is None:
                least = cutoff(scaled, least, f.top_k, f.top_p, windowed=f.windowed)
            else:
                least[f.rows] = cutoff(
                    scaled[f.rows], least[f.rows], f.top_k, f.top_p, windowed=f.windowed
                )
    staged = staging.put(keys.ravel().view(np.int32))[: keys.size]
    row_keys = staged.view(mx.uint32).reshape(keys.shape)
    chosen = draw(scaled, least, row_keys).astype(mx.int32)
    if arrays.rows is None:
        return chosen
    token_ids = mx.argmax(batch_logits, axis=-1).astype(mx.int32)
    token_ids[arrays.rows] = chosen[arrays.sources]
    return token_ids


def settings_of(draws: Draws, keys: Keys) -> NDArray[np.int32]:
    """Return the settings of all rows, int32 [rows, 6], with the keys of those that are drawn."""
    settings = draws.settings.copy()
    distinct = slice(draws.num_drawn)
    settings[draws.batch_rows[distinct], 4:] = keys[distinct].view(np.int32)
    return settings


def by_kernel(batch_logits: mx.array, settings: mx.array) -> tuple[mx.array, mx.array]:
    """Return the tokens that `by_functions` returns, and the next step's ids, by the kernel.

    The tokens are NO_TOKEN for rows without a valid choice. `settings` are those of `settings_of`.
    """
    rows, vocab_size = batch_logits.shape
    vector = vector_width(batch_logits.dtype.size, vocab_size)
    simdgroups = logit_simdgroups(vocab_size)
    token_ids, next_ids = launch.run(
        "draw",
        [batch_logits, settings],
        [("T", batch_logits.dtype)],
        [
            ("V", vocab_size),
            ("VEC", vector),
            ("SHIFT", _ZEROS[batch_logits.dtype]),
            ("NSG", simdgroups),
        ],
        threads=rows * simdgroups * 32,
        group=simdgroups * 32,
        shapes=[(rows,)] * 2,
        dtypes=[mx.int32] * 2,
    )
    return token_ids, next_ids


def _compare(dtype: mx.Dtype, vocab_size: int) -> str | None:
    if dtype not in _ZEROS or vocab_size < _FEWEST:
        return f"there is no kernel for {vocab_size} logits in {dtype}"
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
    assert draws is not None, "every row is drawn"
    some = mx.random.normal((rows, vocab_size), key=mx.random.key(23))
    some[:, ::7] = -mx.inf  # as a mask does
    positions = np.arange(len(draws.seeds), dtype=np.uint64)
    keys, staging = draw_keys(draws.seeds, positions), Staging()
    some = some.astype(dtype)
    settings = mx.array(settings_of(draws, keys).ravel())
    found = np.array(by_kernel(some, settings)[0])
    for name, at in zip(kinds, range(0, rows, each), strict=True):
        # All rows of a kind: MLX compiles no gather and no scatter, each of which takes seconds.
        logits, chosen = some[at : at + each], entries[at : at + each]
        own = plan_draws(chosen, each, vocab_size)
        if own is None:
            wanted = mx.argmax(logits, axis=-1)
        else:
            first = int(np.flatnonzero(draws.batch_rows == at)[0])
            wanted = by_functions(logits, own, keys[first : first + each], staging)
        if (found[at : at + each] != np.array(wanted)).any():
            return f"tokens differ with {name}"
    some[0, 3], some[1, vocab_size - 1], some[2] = mx.nan, mx.inf, -mx.inf
    for token_ids, none in zip(by_kernel(some, settings), (NO_TOKEN, 0), strict=True):
        if (np.array(token_ids) != [none] * 3 + found[3:].tolist()).any():
            return f"rows without a valid choice do not get {none}"
    return None


#: None if the kernel draws the same tokens as MLX's functions for a type and vocabulary size,
#: otherwise the problem. The first call for them compiles the kernel.
verdict = launch.Verdict(_compare)


def greedy(batch_logits: mx.array) -> tuple[mx.array, mx.array]:
    """Return the most likely tokens of [rows, vocab_size], and the next step's ids, by a kernel.

    They are those of `mx.argmax` and `_usable`, which read the logits twice.
    """
    rows, vocab_size = batch_logits.shape
    simdgroups = logit_simdgroups(vocab_size)
    token_ids, next_ids = launch.run(
        "greedy",
        [batch_logits],
        [("T", batch_logits.dtype)],
        [
            ("V", vocab_size),
            ("VEC", vector_width(batch_logits.dtype.size, vocab_size)),
            ("NSG", simdgroups),
        ],
        threads=rows * simdgroups * 32,
        group=simdgroups * 32,
        shapes=[(rows,), (rows,)],
        dtypes=[mx.int32, mx.int32],
    )
    return token_ids, next_ids


def _compare_greedy(dtype: mx.Dtype, vocab_size: int) -> str | None:
    if dtype not in _ZEROS or vocab_size < _FEWEST:
        return f"there is no kernel for {vocab_size} logits in {dtype}"
    rows = mx.random.normal((7, vocab_size), key=mx.random.key(29))
    rows[0, vocab_size // 3 :: 5] = 99.0  # the first of equal ones
    rows[1, vocab_size - 1] = mx.nan
    rows[2, 3] = mx.inf
    rows[3] = -mx.inf
    rows[4, : vocab_size - 1] = -mx.inf
    rows = rows.astype(dtype)
    ids = mx.argmax(rows, axis=-1).astype(mx.int32)
    for name, found, wanted in zip(
        ("tokens", "next ids"), greedy(rows), _usable(ids, rows.max(axis=-1)), strict=True
    ):
        if found.tolist() != wanted.tolist():
            return f"{name} differ: {found.tolist()} instead of {wanted.tolist()}"
    return None


#: None if the kernel chooses the same tokens as MLX's functions, otherwise the problem.
greedy_verdict = launch.Verdict(_compare_greedy)


def _keys(draws: Draws, seqs: Sequence[SampleRow]) -> Keys:
    """Return the keys of the rows that are drawn, from their seeds and positions."""
    positions = np.array([seq.position for seq in seqs], dtype=np.uint64)
    return draw_keys(draws.seeds, positions[draws.batch_rows])


#: In place of a token that could not be chosen: the row had NaN, infinity or no allowed token.
NO_TOKEN = -1


class SampleRow(NamedTuple):
    """A row whose next token is sampled.

    `position` is the number of tokens before it, and `num_output` the number of output tokens among
    them; both include tokens in flight. `allowed` has a bit for each token id that the mask allows
    (LSB first; ids past its end are not allowed). None allows all tokens.

    `assumed` is for rows of a proposal: the proposed tokens before the row, which count as output
    for its penalties. `accept` later counts the tokens that were accepted.
    """

    seq_id: int
    position: int
    num_output: int
    allowed: bytes | None = None
    assumed: Tokens[int] | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens that a step samples, as lazy device arrays.

    `token_ids` are int32 [rows], with NO_TOKEN for rows without a valid choice, whose request
    fails. `next_ids` are the inputs of the next step: the same ids, with 0 in place of NO_TOKEN.
    They are another array because MLX may move the array that the host reads. `logprobs` is None if
    no row requests them. With a `delivery`, the host gets the token ids faster.
    """

    token_ids: mx.array
    next_ids: mx.array
    logprobs: Logprobs | None
    delivery: Delivery | None = None

    @classmethod
    def of(cls, token_ids: mx.array) -> Sampled:
        """Return tokens that were sampled on another device."""
        return cls(token_ids, _next(token_ids), None)

    def arrays(self) -> tuple[mx.array, ...]:
        """Return the arrays to evaluate."""
        logprobs = self.logprobs.arrays() if self.logprobs else ()
        done = (self.delivery.done,) if self.delivery else ()
        return (self.token_ids, self.next_ids, *done, *logprobs)

    def read(self) -> list[int]:
        """Wait for the token ids of all rows."""
        if self.delivery is not None:
            return self.delivery.read()
        return cast("list[int]", self.token_ids.tolist())


class Sampler:
    """Samples tokens for batches of the sequences that were added.

    A sequence's tokens depend on its logits, its parameters and its seed, and not on the batch. The
    key of a draw is (seed, position), so a sequence that is preempted and added again gets the same
    tokens.

    Penalties count a token from the next step on, before the host has read it: `sample` adds the
    count to the graph (see TokenHistory). So every call of `sample` must belong to a step that
    runs, in the order of the calls: a discarded step would leave its tokens counted.
    """

    def __init__(
        self,
        vocab_size: int,
        max_num_seqs: int,
        eos_token_ids: Collection[int],
        staging: Staging | None = None,
    ) -> None:
        self._staging = staging or Staging()
        self._outbox = Outbox()
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(i for i in eos_token_ids if 0 <= i < vocab_size)
        self._history = TokenHistory(vocab_size, max_num_seqs)
        self._entries: dict[int, Entry] = {}
        self._least: dict[int, int] = {}  # min_tokens by seq_id, if set
        self._planned_for: set[int] = set()  # the seq_ids that need a plan
        self._composition: tuple[object, ...] = ()
        self._plan = PLAIN

    def warm_up(self, dtype: mx.Dtype) -> None:
        """Compile the kernels that draw from logits of this type, and from adjusted ones."""
        for each in (dtype, mx.float32):
            verdict(each, self._vocab_size)
            mx.eval(*_usable(mx.zeros((1,), mx.int32), mx.zeros((1,), each)))
        greedy_verdict(dtype, self._vocab_size)

    def __contains__(self, seq_id: int) -> bool:
        """Return whether a sequence was added and not removed."""
        return seq_id in self._entries

    @property
    def is_greedy(self) -> bool:
        """Whether all sequences take the most likely token, masks apart."""
        return not self._planned_for

    def settings(self, seqs: Sequence[SampleRow], num_rows: int) -> NDArray[np.int32] | None:
        """Return the settings of `by_kernel` for the tokens of `seqs`, int32 [rows, 6].

        They are [0, 6] if all are the most likely tokens, for `greedy`: if `is_greedy`, `seqs` may
        be left out. None if a kernel is not enough.
        """
        if any(seq.allowed is not None for seq in seqs):
            return None
        plan = self._planned(seqs, num_rows)
        if plan.edits is not None or plan.penalties is not None or plan.num_top is not None:
            return None
        if plan.draws is None:
            return np.zeros((0, 6), np.int32)
        return settings_of(plan.draws, _keys(plan.draws, seqs))

    def add(
        self,
        seq_id: int,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        output_token_ids: Sequence[int] = (),
        index: int = 0,
    ) -> None:
        """Add a sequence when it is admitted; with its output when it is admitted again.

        `index` is the choice (0 … n-1), which is added to the request's seed, so that choices
        differ. Without a seed, a random one is used.
        """
        assert seq_id not in self._entries, f"sequence {seq_id} was added twice"
        slot = None
        if has_penalties(params):
            slot = self._history.open(prompt_token_ids, output_token_ids)
        self._entries[seq_id] = Entry(
            params=params,
            seed=secrets.randbits(64) if params.seed is None else params.seed + index,
            slot=slot,
            ending_token_ids=tuple(sorted(ending_token_ids(params, self._eos_token_ids))),
        )
        if params.min_tokens:
            self._least[seq_id] = params.min_tokens
        if not is_plain(params):
            self._planned_for.add(seq_id)

    def remove(self, seq_id: int) -> None:
        """Remove a sequence that ended or was preempted; a step in flight may still sample it."""
        entry = self._entries.pop(seq_id)
        self._least.pop(seq_id, None)
        self._planned_for.discard(seq_id)
        if entry.slot is not None:
            self._history.close(entry.slot)
        self._composition = ()

    def accept(self, seq_id: int, token_ids: Sequence[int]) -> None:
        """Count the accepted tokens of a proposal as output."""
        slot = self._entries[seq_id].slot
        if slot is not None and token_ids:
            amounts = mx.full((len(token_ids),), OUTPUT, mx.int32)
            slots = mx.full((len(token_ids),), slot, mx.int32)
            self._history.append(slots, mx.array(list(token_ids), mx.int32), amounts)

    def sample(self, batch_logits: mx.array, seqs: Sequence[SampleRow]) -> Sampled:
        """Return the next tokens of `seqs`, whose logits are the first rows of `batch_logits`.

        `batch_logits` is [rows, vocab_size] of any float type. Rows after those of `seqs` are
        padding; their tokens are not used. Nothing is evaluated.
        """
        plan = self._planned(seqs, batch_logits.shape[0])
        allowed = {row: seq.allowed for row, seq in enumerate(seqs) if seq.allowed is not None}
        chosen_from = self._adjust(batch_logits, plan, allowed, seqs)
        token_ids, next_ids = self._choose(batch_logits, chosen_from, plan.draws, seqs)
        if (penalties := plan.penalties) is not None:
            self._history.append(penalties.slots, next_ids[penalties.rows], penalties.increments)
        logprobs = None
        if plan.num_top is not None:
            logprobs = gather_logprobs(batch_logits, token_ids, plan.num_top)
        return Sampled(token_ids, next_ids, logprobs, self._outbox.send(token_ids))

    def _choose(
        self,
        batch_logits: mx.array,
        chosen_from: mx.array,
        draws: Draws | None,
        seqs: Sequence[SampleRow],
    ) -> tuple[mx.array, mx.array]:
        """Return the tokens chosen from the adjusted logits, and the ids of the next step."""
        adjusted = chosen_from is not batch_logits
        if draws is not None:
            keys = _keys(draws, seqs)
            if verdict(chosen_from.dtype, chosen_from.shape[-1]) is None:
                settings = self._staging.put(settings_of(draws, keys).ravel())
                token_ids, next_ids = by_kernel(chosen_from, settings)
                if adjusted:  # a mask may have hidden the NaN
                    return _usable(token_ids, batch_logits.max(axis=-1))
                return token_ids, next_ids
            token_ids = by_functions(chosen_from, draws, keys, self._staging)
        elif not adjusted and greedy_verdict(chosen_from.dtype, chosen_from.shape[-1]) is None:
            return greedy(chosen_from)
        else:
            token_ids = mx.argmax(chosen_from, axis=-1).astype(mx.int32)
        token_ids, next_ids = _usable(token_ids, chosen_from.max(axis=-1))
        if adjusted:  # a mask may have hidden the NaN
            token_ids, next_ids = _usable(token_ids, batch_logits.max(axis=-1))
        return token_ids, next_ids

    def _planned(self, seqs: Sequence[SampleRow], num_rows: int) -> Plan:
        """Return the plan, which is made and uploaded only when the batch's composition changes."""
        if self.is_greedy:
            return PLAIN
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
        """Return the logits after biases, masks and penalties; the same array without any."""
        if plan.edits is None and plan.penalties is None and not allowed:
            return batch_logits
        adjusted = batch_logits.astype(mx.float32)
        if (edits := plan.edits) is not None:
            adjusted = adjusted.at[edits.rows, edits.token_ids].add(edits.amounts)
        if allowed:
            rows, width = (
                padded_rows(list(allowed), batch_logits.shape[0]),
                -(-self._vocab_size // 8),
            )
            # Ids past the end of a mask are not allowed.
            data = b"".join(allowed[row][:width].ljust(width, b"\0") for row in rows.tolist())
            packed = mx.array(np.frombuffer(data, dtype=np.uint8).reshape(len(rows), width))
            index = mx.array(rows)
            adjusted[index] = apply_mask(adjusted[index], packed)
        if (penalties := plan.penalties) is not None:
            adjusted[penalties.rows] = penalise(
                adjusted[penalties.rows],
                self._counts(penalties, seqs),
                penalties.repetition,
                penalties.presence,
                penalties.frequency,
            )
        return adjusted

    def _counts(self, penalties: Penalties, seqs: Sequence[SampleRow]) -> mx.array:
        """Return the counts of penalised rows, with their assumed tokens."""
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


# Compiled: otherwise, constants would be arrays in host memory, which kernels read slowly.


def _usable(token_ids: mx.array, maxima: mx.array) -> tuple[mx.array, mx.array]:
    """Return token ids with NO_TOKEN for invalid rows, and the ids for the next step.

    A row is invalid if its maximum is not finite: it has NaN, which `max` keeps, or is all -inf.
    """
    if launch.backend() == "cuda" and _marks(maxima.dtype) is None:
        return _mark(token_ids, maxima)
    return _usable_compiled(token_ids, maxima)


def _mark(token_ids: mx.array, maxima: mx.array) -> tuple[mx.array, mx.array]:
    """Return the same by a kernel, which takes CUDA's compiler 0.1 s instead of five."""
    usable, following = launch.run(
        "usable", [token_ids, maxima], [("T", maxima.dtype)], [],
        threads=token_ids.size, group=32, shapes=[token_ids.shape] * 2, dtypes=[mx.int32] * 2,
    )  # fmt: skip
    return usable, following


@launch.Verdict
def _marks(dtype: mx.Dtype) -> str | None:
    """Return why the kernel does not mark rows for maxima of `dtype`, or None."""
    maxima = mx.array([1.0, -mx.inf, mx.nan, mx.inf, -2.5], dtype)
    found = [each.tolist() for each in _mark(mx.array([7, 8, 9, 10, -1], mx.int32), maxima)]
    expected = [[7, NO_TOKEN, NO_TOKEN, NO_TOKEN, NO_TOKEN], [7, 0, 0, 0, 0]]
    return None if found == expected else f"it found {found}, expected {expected}"


@partial(mx.compile, shapeless=True)
def _usable_compiled(token_ids: mx.array, maxima: mx.array) -> tuple[mx.array, mx.array]:
    usable = mx.where(mx.isfinite(maxima), token_ids, NO_TOKEN)
    return usable, mx.maximum(usable, 0)


@partial(mx.compile, shapeless=True)
def _next(token_ids: mx.array) -> mx.array:
    return mx.maximum(token_ids, 0)
