"""HeadRunner: drafts of an EAGLE-3 head or a layer for multi-token prediction, and its keys.

All tokens of a draft are computed in one compiled graph: the rows that the head has not read yet,
then a row for each further token. The graph itself finds the last row to read, by the first token
that is not the proposed one.

The keys and values of each sequence are in a region of one pool, a run of blocks. There are as many
regions as sequences, of the size of the longest; they grow by doubling, and end with the sequences.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Several
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from modelpack_engine.attention.kv_pools import KVLayout, TokenMajorPools
from modelpack_engine.core.buckets import round_up
from modelpack_engine.kernels import decode_attention, may_write
from modelpack_engine.kernels.recording import join
from modelpack_engine.layers.drafts import DraftShape, accepted, pick
from modelpack_engine.layers.kernels import take, take_rows
from modelpack_engine.models.eagle import EagleHead
from modelpack_engine.models.mtp import MtpHead
from modelpack_engine.runner.continued import Continued
from modelpack_engine.sampling.delivery import Delivery, Outbox
from modelpack_engine.speculation.head_layers import Embed, FusedLayer, head_layer

_BLOCK = 16
#: The tokens of a region at first; doubled as needed.
_FEWEST_TOKENS = 256
#: The bytes of a pool that is kept between sequences if graphs have its address.
_SMALL = 64 << 20
#: Stands for no proposed token: no token is drawn that equals it.
_NONE = -2


class Rows(NamedTuple):
    """The rows of a sequence that a head reads, and where it writes their keys and values.

    `states` [rows, hidden] are the model's at `positions`; None in the graph that computes them.
    `proposed` are the tokens that were proposed after the rows but the last, or those of a prompt.
    The region has `length` rows already.
    """

    region: int
    length: int
    positions: list[int]
    states: mx.array | None
    proposed: tuple[int, ...] = ()


class HeadDraft(NamedTuple):
    """A draft on the device.

    `found` is int32 [sequences, 1 + tokens]: the number of rows that were read, and the drafted
    tokens. `probabilities` [sequences, tokens] are None if they are not wanted. With a `delivery`,
    the host gets `found` faster.
    """

    found: mx.array
    probabilities: mx.array | None
    delivery: Delivery | None


class HeadRunner:
    """Runs `head`; a draft has `num_tokens` tokens.

    `embed` are the model's embeddings, for heads without their own. Regions never hold more than
    `max_tokens`.
    """

    def __init__(
        self,
        head: EagleHead | MtpHead,
        embed: Embed,
        *,
        num_tokens: int,
        max_tokens: int,
        probabilities: bool,
    ) -> None:
        self._head, self._num_tokens, self._probabilities = head, num_tokens, probabilities
        self._max_tokens = round_up(max_tokens, (_BLOCK,))
        self._layer = head_layer(head, head.embed_tokens if "embed_tokens" in head else embed)
        self._layout = KVLayout(
            head.num_kv_heads, head.key_dim, head.num_kv_heads, head.value_dim, head.dtype
        )
        #: The token of each column of the logits.
        self._tokens = head.token_ids(mx.arange(head.num_logits))
        self._in_place = may_write(head.dtype, head.dtype)
        self._regions = self._size = self._generation = 0
        #: Whether drafts run within graphs, which have the address of the pool.
        self.within_graphs = False
        self._pools = TokenMajorPools(self._layout, 0, _BLOCK)
        self._token = mx.zeros((1,), mx.int32)  # of the last write in place
        self._graphs: dict[DraftShape, Callable[..., Any]] = {}

    def read(self, rows: Rows, ids: list[int], size: int) -> None:
        """Compute keys and values of rows that `ids` follow, padded to `size` rows."""
        _, written = self._run([rows], mx.array([padded(ids, size)], mx.int32), drafts=False)
        if self.within_graphs:
            mx.eval(*written)  # graphs do not wait for MLX
        else:
            mx.async_eval(*written)

    def draft(self, rows: list[Rows], ids: mx.array, outbox: Outbox | None = None) -> HeadDraft:
        """Launch a draft behind rows of sequences, which `ids` int32 [sequences, size] follow.

        A sequence's rows are read up to the first of `ids` that was not proposed.
        """
        (found, *probabilities), written = self._run(rows, ids, drafts=True)
        delivery = None if outbox is None else outbox.send(found.reshape(-1))
        mx.async_eval(delivery.done if delivery else found, *probabilities, *written)
        return HeadDraft(found, probabilities[0] if probabilities else None, delivery)

    def warm_up(self, sizes_read: Iterable[int], sizes_drafted: Iterable[int]) -> None:
        """Compile what reads rows of one sequence, and drafts behind them, in these sizes."""

        def rows(size: int) -> Rows:
            states = mx.zeros((size, self._head.norm.weight.size), self._head.dtype)
            return Rows(0, 0, list(range(size)), states)

        for size in sizes_read:
            self.read(rows(size), [0] * size, size)
        for size in sizes_drafted:
            mx.eval(self.draft([rows(size)], mx.zeros((1, size), mx.int32)).found)
        self.clear()

    def reserve(self, regions: int, tokens: int) -> None:
        """Make room for this many regions of so many tokens, and what a draft adds to them."""
        if self._holds(regions, tokens):
            return
        tokens += self._num_tokens
        size = max(self._size, _FEWEST_TOKENS, 1 << (tokens - 1).bit_length())
        size = max(min(size, self._max_tokens), round_up(tokens, (_BLOCK,)))
        count = max(self._regions, 1 << (regions - 1).bit_length())
        pools = TokenMajorPools(self._layout, count * size // _BLOCK, _BLOCK)
        if self._regions:
            before = (self._regions, self._size)
            more = [(0, count - self._regions), (0, size - self._size), (0, 0), (0, 0)]
            pools.keys, pools.values = (
                mx.pad(
                    mx.depends(pool, self._token).reshape(*before, *pool.shape[1:]), more
                ).reshape(-1, *pool.shape[1:])
                for pool in (self._pools.keys, self._pools.values)
            )  # fmt: skip
        mx.eval(pools.keys, pools.values)  # kernels write to their memory
        self._pools, self._regions, self._size = pools, count, size
        self._generation += 1

    def has_room(self, rows: list[Rows], num_rows: int) -> bool:
        """Return whether the pool has room for the draft of `within`."""
        return self._holds(*_needed(rows, _rows_of_each(rows, num_rows)))

    def _holds(self, regions: int, tokens: int) -> bool:
        """Return whether there is room for what `reserve` makes room for."""
        return regions <= self._regions and tokens + self._num_tokens <= self._size

    def within(
        self,
        rows: list[Rows],
        first_rows: list[int],
        num_rows: int,
        *,
        drafts: bool,
        prompt: bool = False,
    ) -> DraftWithin | None:
        """Return a draft behind the rows of a step, in the graph that computes their states.

        The step has `num_rows` rows, and `first_rows` are the first ones of the sequences. Without
        `drafts`, the rows are only read. The rows of a whole `prompt` are those of one sequence.
        None if the pools are not written in place, if probabilities are wanted, or for a prompt if
        MLX computes the layer.
        """
        if not self._in_place or self._probabilities:
            return None
        if prompt and not isinstance(self._layer, FusedLayer):
            return None
        self.within_graphs = True
        size = _rows_of_each(rows, num_rows)
        shape = self._shape(rows, size, drafts=drafts)
        numbers = self._numbers(rows, shape)
        if len(rows) > 1:
            at = [
                padded([first + row for row in range(len(each.positions))], size)
                for first, each in zip(first_rows, rows, strict=True)
            ]
            numbers = np.concatenate([numbers, np.array(at, np.int32).ravel()])
        elif prompt:  # the last row is followed by the first sampled token, which is behind `size`
            known = np.arange(len(rows[0].positions) - 1, dtype=np.int32)
            numbers = np.concatenate(
                [numbers, np.pad(known, (0, size - len(known)), constant_values=size)]
            )
        return DraftWithin(self, shape, self._generation, numbers, rows, prompt)

    def clear(self) -> None:
        """Free the pool, as no sequence is left; a small one that graphs read is kept."""
        if not self.within_graphs or self._pools.keys.nbytes + self._pools.values.nbytes > _SMALL:
            self._regions = self._size = 0
            self._pools = TokenMajorPools(self._layout, 0, _BLOCK)

    def _run(
        self, rows: list[Rows], ids: mx.array, *, drafts: bool
    ) -> tuple[list[mx.array], list[mx.array]]:
        """Build a graph of `_trace`; return what it finds, and what it writes."""
        count, size = ids.shape
        shape = self._shape(rows, size, drafts=drafts)
        if shape not in self._graphs:
            self._graphs[shape] = mx.compile(partial(self._trace, shape))
        states = [_pad_rows(each.states, size) for each in rows if each.states is not None]
        pools = self._pools
        found, written = self._graphs[shape](
            ids, mx.array(self._numbers(rows, shape)),
            states[0] if count == 1 else mx.concatenate(states),
            pools.keys, pools.values, self._token, self._tokens,
        )  # fmt: skip
        if self._in_place:
            [self._token] = written
        else:
            pools.keys, pools.values = written
        return found, written

    def _shape(self, rows: list[Rows], size: int, *, drafts: bool) -> DraftShape:
        """Return the shape of a graph for `size` rows of each sequence, and make room for them."""
        num_tokens = self._num_tokens if drafts else 0
        regions, longest = _needed(rows, size)
        self.reserve(regions, longest)
        width = 0
        if drafts:  # few widths: for each, a graph is compiled
            longest += num_tokens
            width = min(max(_FEWEST_TOKENS, 1 << (longest - 1).bit_length()), self._size)
        return DraftShape(len(rows), size, width // _BLOCK, num_tokens)

    def _numbers(self, rows: list[Rows], shape: DraftShape) -> NDArray[np.int32]:
        """Return the numbers that `DraftShape.cut` splits.

        One array moves the fewest pages of CUDA's managed memory.
        """
        starts = np.array([each.region * self._size + each.length for each in rows])
        parts = [
            np.array([padded(each.positions, shape.rows) for each in rows]),
            starts[:, None] + np.arange(shape.rows),
            np.array(
                [[*each.proposed, *[_NONE] * (shape.rows - len(each.proposed))] for each in rows]
            ),
            np.array([[each.region * self._size // _BLOCK] for each in rows])
            + np.arange(shape.width),
            np.array([each.length for each in rows]),
        ]
        return np.concatenate([part.ravel() for part in parts]).astype(np.int32)

    def _trace(
        self,
        shape: DraftShape,
        ids: mx.array,
        numbers: mx.array,
        states: mx.array,
        keys: mx.array,
        values: mx.array,
        token: mx.array,
        tokens: mx.array,
    ) -> tuple[list[mx.array], list[mx.array]]:
        """Build a graph; return what it finds, and the token of its last write, or the pools.

        `token` is that of the last write before, and `tokens` are those of the logits' columns.
        """
        pools, layer = copy.copy(self._pools), self._layer
        pools.keys, pools.values = keys, values
        if self._in_place:
            pools.set_written(token)
        positions, slots, _, tables, _ = shape.cut(numbers)
        carried, queries = layer.write(states, ids.reshape(-1, 1), positions, slots, pools)
        if not shape.num_tokens:
            return [], self._written(pools)
        places = accepted(ids, numbers, shape)
        found = places.found
        if shape.rows > 1:
            heads, last = queries.shape[1:], places.last
            carried = layer.take(carried, last)
            queries = take_rows(queries.reshape(len(positions), -1), last).reshape(-1, *heads)
        hidden, probabilities = states, list[mx.array]()
        for step in range(shape.num_tokens):
            positions, slots, lengths = places.of_token(step)
            if step:  # the drafted token comes after the last row
                carried, queries = layer.write(hidden, found, positions, slots, pools)
            attended = decode_attention(
                queries, pools.keys, pools.values, tables, lengths, scale=self._head.scale,
                num_kv_heads=self._layout.key_heads, block_size=_BLOCK, window=self._head.window,
                sinks=self._head.sinks,
            )  # fmt: skip
            hidden, logits = layer.finish(carried, attended.reshape(shape.sequences, -1))
            found = pick(logits, found, tokens)
            if self._probabilities:
                top = mx.max(logits, axis=-1)
                probabilities.append(mx.exp(top - mx.logsumexp(logits, axis=-1)))
        made = [found, mx.stack(probabilities, axis=1)] if probabilities else [found]
        return made, self._written(pools)

    def _written(self, pools: TokenMajorPools) -> list[mx.array]:
        return [pools.last_write()] if self._in_place else [pools.keys, pools.values]


@dataclass(frozen=True, slots=True, eq=False)
class DraftWithin:
    """A draft in the graph of the model's step: a `replay.DraftBehind`.

    The integers that it finds are those of `HeadDraft.found`. Behind the `numbers` of the runner
    are the rows of the step that are those of the sequences, if there are several; and for a
    `prompt`, where the token after each row is, in the proposed tokens and the sampled ones.
    """

    runner: HeadRunner
    key: DraftShape
    generation: int
    numbers: NDArray[np.int32]
    rows: list[Rows]
    prompt: bool = False

    @property
    def num_drafted(self) -> int:
        """Do as `replay.DraftBehind.num_drafted`."""
        return self.key.num_tokens

    @property
    def num_found(self) -> int:
        """The integers that the host reads; none if rows are only read."""
        return self.key.sequences * (1 + self.num_drafted) if self.num_drafted else 0

    def after(self, sequences: Several[Continued], num_rows: int) -> DraftWithin | None:
        """Do as `replay.DraftBehind.after`."""
        rows = [
            Rows(
                before.region,
                before.length + each.first - before.positions[0],
                list(range(each.first, each.num_tokens)),
                None,
            )
            for before, each in zip(self.rows, sequences, strict=True)
        ]
        firsts = [each.row for each in sequences]
        if not self.runner.has_room(rows, num_rows):
            return None
        return self.runner.within(rows, firsts, num_rows, drafts=True)

    def propose(self, numbers: NDArray[np.int32], token_ids: Several[list[int]]) -> None:
        """Do as `replay.DraftBehind.propose`."""
        shape = self.key
        first = 2 * shape.sequences * shape.rows
        for index, of_sequence in enumerate(token_ids):
            at = first + index * shape.rows
            numbers[at : at + len(of_sequence) - 1] = of_sequence[1:]

    def trace(self, ids: mx.array, numbers: mx.array, hidden: mx.array) -> mx.array | None:
        """Compute the draft by single kernels."""
        shape, runner = self.key, self.runner
        mx.eval(runner._tokens)
        count = shape.sequences * shape.rows
        if self.prompt:
            numbers, at = numbers[:-count], numbers[-count:]
            _, _, proposed, *_ = shape.cut(numbers)
            ids, hidden = take(join(proposed.reshape(-1), ids), at), hidden[:count]
        elif shape.sequences == 1:
            ids, hidden = ids[:count], hidden[:count]
        else:
            numbers, at = numbers[:-count], numbers[-count:]
            ids, hidden = take(ids, at), take_rows(hidden, at)
        found, _ = runner._trace(
            shape, ids.reshape(shape.sequences, shape.rows), numbers, hidden,
            runner._pools.keys, runner._pools.values, runner._token, runner._tokens,
        )  # fmt: skip
        return found[0].reshape(-1) if found else None


def _needed(rows: list[Rows], size: int) -> tuple[int, int]:
    """Return how many regions there must be for `size` more rows of each, and the longest then."""
    return 1 + max(each.region for each in rows), max(each.length for each in rows) + size


def _rows_of_each(rows: list[Rows], num_rows: int) -> int:
    """Return the rows of each sequence in the draft of a step with so many rows in all."""
    longest = max(len(each.positions) for each in rows)
    return num_rows if len(rows) == 1 else 1 << (longest - 1).bit_length()


def padded(numbers: list[int], count: int) -> list[int]:
    """Return numbers with zeros after them, `count` in all."""
    return numbers + [0] * (count - len(numbers))


def _pad_rows(states: mx.array, count: int) -> mx.array:
    missing = count - len(states)
    return mx.pad(states, [(0, missing), (0, 0)]) if missing else states
