"""Sequence: the state of one choice of a request, which the scheduler owns."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from enum import StrEnum

from modelpack_engine.outputs import FinishReason
from modelpack_engine.request import Media, SamplingParams

_next_seq_id = itertools.count().__next__


class SequenceStatus(StrEnum):
    """The state of a sequence; `finish_reason` says why it finished."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


#: Read for every token: looking up an enumeration's member takes three times as long.
_FINISHED = SequenceStatus.FINISHED


@dataclass(slots=True, eq=False)
class Restore:
    """Blocks that a sequence gets from the prefix cache and the offload, before it can use them.

    They follow its block tables, which then have `stop` blocks. For each pool, `first_seen` is the
    first block that is not before the window, and `blocks` are those that the sequence holds.
    `lacks_blocks` says that a pool had no block for content that was fetched.
    """

    stop: int
    first_seen: list[int]
    blocks: list[list[int]]
    lacks_blocks: bool = False


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and its output so far. Only the scheduler changes it.

    `seq_id` is unique in the process: the key of recurrent state and of sampler rows. `cache_salt`
    covers what the keys and values depend on besides model, tokens and media: adapter, and the
    owner if owners do not share prefixes. Waiting sequences of different `owner` take turns.

    Known tokens are in `prompt_token_ids` and `output_token_ids`. `num_inflight` more tokens are in
    flight: sampled by a submitted step that the host has not read. The keys and values of the first
    `num_computed_tokens` of all these tokens are written, by this or earlier submitted steps.
    """

    request_id: str
    prompt_token_ids: list[int] = field(repr=False)
    params: SamplingParams = field(repr=False)
    index: int = 0
    eos_token_ids: frozenset[int] = field(default=frozenset(), repr=False)
    cache_salt: bytes = field(default=b"", repr=False)
    owner: bytes = field(default=b"", repr=False)
    #: Whether the sequence gives its place to others that wait.
    background: bool = field(default=False, repr=False)
    #: The adapter of its request, which `AdapterSlots` knows; None without an adapter.
    adapter: object | None = field(default=None, repr=False)
    #: The slot of its adapter in the runner, set when it is admitted; 0 without an adapter.
    adapter_slot: int = field(default=0, repr=False)
    #: The pictures of the prompt, in its order.
    media: tuple[Media, ...] = field(default=(), repr=False)
    seq_id: int = field(default_factory=_next_seq_id)
    status: SequenceStatus = field(default=SequenceStatus.WAITING, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    stop_reason: str | int | None = field(default=None, init=False)
    output_token_ids: list[int] = field(default_factory=list, init=False, repr=False)
    num_inflight: int = field(default=0, init=False)
    num_computed_tokens: int = field(default=0, init=False)
    #: Tokens to compute before the next is sampled: the prompt, and after a preemption its outputs.
    num_prefill_tokens: int = field(init=False)
    #: Prompt tokens that the prefix cache had when the sequence was first admitted.
    num_cached_tokens: int = field(default=0, init=False)
    num_preemptions: int = field(default=0, init=False)
    #: Proposed tokens that were verified, and those that were accepted.
    num_proposed_tokens: int = field(default=0, init=False)
    num_accepted_tokens: int = field(default=0, init=False)
    #: Prompt positions whose log-probabilities submitted steps compute.
    num_prompt_logprobs: int = field(default=0, init=False)
    #: The sequence ends at this many tokens; set by `Scheduler.add`.
    max_num_tokens: int = field(default=0, init=False, repr=False)
    #: Set while the sequence waits; the lowest is admitted first.
    priority: int = field(default=0, init=False, repr=False)
    block_table: list[int] = field(default_factory=list, init=False, repr=False)
    #: The tables for the block manager's window pools, each as long as `block_table`.
    window_tables: list[list[int]] = field(default_factory=list, init=False, repr=False)
    #: Hashes of its full blocks, computed as needed.
    block_hashes: list[bytes] = field(default_factory=list, init=False, repr=False)
    #: Blocks of the table that were published to the prefix cache, or came from it.
    num_published_blocks: int = field(default=0, init=False, repr=False)
    #: The recurrent snapshot to continue from, after a shared prefix.
    snapshot: object | None = field(default=None, init=False, repr=False)
    #: How far the rotary positions of tokens after all media are from their own; None: not known.
    rope_shift: int | None = field(default=None, init=False, repr=False)
    #: Blocks that are being restored.
    restore: Restore | None = field(default=None, init=False, repr=False)
    #: The next restore begins once this many tokens are computed: the last ran out of blocks.
    restore_from: int = field(default=0, init=False, repr=False)
    #: The position where the prompt leaves a cached prefix that has no snapshot there.
    branch: int = field(default=0, init=False, repr=False)
    #: Blocks at the start of the table that are before the window of all layers, and released.
    num_unseen_blocks: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self.num_prefill_tokens = len(self.prompt_token_ids)

    def fork(self, index: int) -> Sequence:
        """Return a new sequence for choice `index` of the same request.

        It shares no state. It finds the prompt's full blocks in the prefix cache and computes the
        partial last block again, as no two sequences write to the same block.
        """
        return Sequence(
            self.request_id,
            self.prompt_token_ids,
            self.params,
            index=index,
            eos_token_ids=self.eos_token_ids,
            cache_salt=self.cache_salt,
            owner=self.owner,
            background=self.background,
            adapter=self.adapter,
            media=self.media,
        )

    @property
    def num_known_tokens(self) -> int:
        """Prompt and output tokens, without those in flight."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens, with those in flight."""
        return self.num_known_tokens + self.num_inflight

    @property
    def num_output_tokens(self) -> int:
        """Output tokens, with those in flight."""
        return len(self.output_token_ids) + self.num_inflight

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens that prefill still has to compute."""
        return self.num_prefill_tokens - self.num_computed_tokens

    @property
    def is_prefill(self) -> bool:
        """Whether more tokens must be computed before the next one can be sampled."""
        return self.num_computed_tokens < self.num_prefill_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is _FINISHED

    @property
    def is_full(self) -> bool:
        """Whether the sequence is complete with its tokens in flight."""
        known = len(self.prompt_token_ids) + len(self.output_token_ids)
        return known + self.num_inflight >= self.max_num_tokens

    @property
    def is_doubtful(self) -> bool:
        """Whether its keys and values may be NaN: no token was sampled since it has started."""
        return self.num_known_tokens <= self.num_prefill_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of prompt tokens must still be computed, by each choice."""
        return (
            self.params.prompt_logprobs is not None
            and self.num_prompt_logprobs < len(self.prompt_token_ids) - 1
        )

    def all_token_ids(self) -> list[int]:
        """Return the known tokens."""
        return self.prompt_token_ids + self.output_token_ids

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Return the tokens at positions `start` to `stop`, all of which are known."""
        assert stop <= self.num_known_tokens, f"token {stop - 1} of {self} is not known"
        cut = len(self.prompt_token_ids)
        if stop <= cut:
            return self.prompt_token_ids[start:stop]
        outputs = self.output_token_ids[max(start - cut, 0) : stop - cut]
        return self.prompt_token_ids[start:cut] + outputs

    def restart(self) -> None:
        """Reset a preempted sequence: all known tokens must be computed again."""
        assert not self.block_table, "free its blocks first"
        self.status = SequenceStatus.WAITING
        self.num_computed_tokens = 0
        self.num_prefill_tokens = self.num_tokens
        self.num_preemptions += 1

    def ending(self) -> tuple[FinishReason, int | None] | None:
        """Return why the newest token ends the sequence, and the stop token if one did; or None."""
        output, params = self.output_token_ids, self.params
        num_output, token_id = len(output), output[-1]
        if num_output > params.min_tokens:
            if token_id in params.stop_token_ids:
                return FinishReason.STOP, token_id
            if token_id in self.eos_token_ids and not params.ignore_eos:
                return FinishReason.STOP, None
        if len(self.prompt_token_ids) + num_output >= self.max_num_tokens:
            return FinishReason.LENGTH, None
        return None
