"""Sequence: the state of one choice of a request, which the scheduler owns."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from enum import StrEnum

from modelpack_engine.outputs import FinishReason
from modelpack_engine.request import SamplingParams

_next_seq_id = itertools.count().__next__


class SequenceStatus(StrEnum):
    """Where a sequence stands; why it finished is its `finish_reason`."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


#: Asked for with every token: an enumeration's attribute takes as long as three of an object.
_FINISHED = SequenceStatus.FINISHED


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and what has been generated for it. The scheduler owns it and alone changes it.

    `seq_id` is unique in the process: the key of recurrent state and of sampler rows. `cache_salt`
    stands for all that its KV depends on besides model and tokens, adapter and media, and for its
    owner where prefixes are not shared between owners.

    Tokens are in one of three places. Known: in `prompt_token_ids` and `output_token_ids`. In
    flight: sampled by a submitted step whose tokens the host has not read, `num_inflight` of them.
    And of all these, the first `num_computed_tokens` have their KV written, or being written by a
    submitted step.
    """

    request_id: str
    prompt_token_ids: list[int] = field(repr=False)
    params: SamplingParams = field(repr=False)
    index: int = 0
    eos_token_ids: frozenset[int] = field(default=frozenset(), repr=False)
    cache_salt: bytes = field(default=b"", repr=False)
    seq_id: int = field(default_factory=_next_seq_id)
    status: SequenceStatus = field(default=SequenceStatus.WAITING, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    stop_reason: str | int | None = field(default=None, init=False)
    output_token_ids: list[int] = field(default_factory=list, init=False, repr=False)
    num_inflight: int = field(default=0, init=False)
    num_computed_tokens: int = field(default=0, init=False)
    #: Tokens to compute before the next is sampled: the prompt, and after a preemption its outputs.
    num_prefill_tokens: int = field(init=False)
    #: Tokens of the prompt that the prefix cache had when the sequence first ran.
    num_cached_tokens: int = field(default=0, init=False)
    num_preemptions: int = field(default=0, init=False)
    #: Tokens that were proposed for it and verified, and those of them that were right.
    num_proposed_tokens: int = field(default=0, init=False)
    num_accepted_tokens: int = field(default=0, init=False)
    #: Positions of the prompt whose log-probabilities a submitted step computes.
    num_prompt_logprobs: int = field(default=0, init=False)
    #: The sequence ends when it has this many tokens; set when it is added.
    max_num_tokens: int = field(default=0, init=False, repr=False)
    #: While it waits: the least is admitted first.
    priority: int = field(default=0, init=False, repr=False)
    block_table: list[int] = field(default_factory=list, init=False, repr=False)
    #: Hashes of its full blocks, as far as they have been needed.
    block_hashes: list[bytes] = field(default_factory=list, init=False, repr=False)
    #: How many blocks of the table have been offered to the prefix cache, or came from it.
    num_published_blocks: int = field(default=0, init=False, repr=False)
    #: Recurrent state to go on from, if its computed tokens end in shared ones.
    snapshot: object | None = field(default=None, init=False, repr=False)
    #: Where its tokens leave those whose blocks, but no snapshot, were there.
    branch: int = field(default=0, init=False, repr=False)
    #: How many blocks at the table's beginning are behind the window of all layers, and given up.
    num_unseen_blocks: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self.num_prefill_tokens = len(self.prompt_token_ids)

    def fork(self, index: int) -> Sequence:
        """Return another choice of the same request, which waits.

        It shares no state: its prompt's full blocks come from the prefix cache, and the partial
        last block is computed again, for no two sequences ever write to one block.
        """
        return Sequence(
            self.request_id,
            self.prompt_token_ids,
            self.params,
            index=index,
            eos_token_ids=self.eos_token_ids,
            cache_salt=self.cache_salt,
        )

    @property
    def num_known_tokens(self) -> int:
        """Prompt and outputs, without those in flight."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and outputs, with those in flight."""
        return self.num_known_tokens + self.num_inflight

    @property
    def num_output_tokens(self) -> int:
        """Outputs, with those in flight."""
        return len(self.output_token_ids) + self.num_inflight

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens that prefill has yet to compute."""
        return self.num_prefill_tokens - self.num_computed_tokens

    @property
    def is_prefill(self) -> bool:
        """Whether tokens are to be computed before the next can be sampled."""
        return self.num_computed_tokens < self.num_prefill_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is _FINISHED

    @property
    def is_full(self) -> bool:
        """Whether the tokens in flight already are its last: nothing more is to be computed."""
        known = len(self.prompt_token_ids) + len(self.output_token_ids)
        return known + self.num_inflight >= self.max_num_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of prompt tokens are still to be computed.

        The first choice computes them for all choices.
        """
        return (
            self.params.prompt_logprobs is not None
            and self.index == 0
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
        """Forget all computed KV: everything known is to be computed again."""
        assert not self.block_table, "its blocks are to be freed first"
        self.status = SequenceStatus.WAITING
        self.num_computed_tokens = 0
        self.num_prefill_tokens = self.num_tokens
        self.num_preemptions += 1

    def ending(self) -> tuple[FinishReason, int | None] | None:
        """Return why its newest token ends it, with the stop token if it was one; else None."""
        token_id = self.output_token_ids[-1]
        if len(self.output_token_ids) > self.params.min_tokens:
            if token_id in self.params.stop_token_ids:
                return FinishReason.STOP, token_id
            if token_id in self.eos_token_ids and not self.params.ignore_eos:
                return FinishReason.STOP, None
        if self.num_known_tokens >= self.max_num_tokens:
            return FinishReason.LENGTH, None
        return None
