"""Speculator: decide when to propose tokens and how many, and ask a proposer for them.

`Engine` owns one if its configuration asks for speculation. The proposers are in
`speculation/ngram.py` and `speculation/draft.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace
from typing import Protocol

from modelpack_engine.config import EngineConfig
from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.core.scheduler import Proposal, Proposed
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.errors import EngineError
from modelpack_engine.models import LoadedModel
from modelpack_engine.models.tokenizer import Tokenizer
from modelpack_engine.outputs import EngineStats
from modelpack_engine.runner.kv_cache_size import Sizes, on_gpu
from modelpack_engine.runner.model_layout import ModelLayout, layout_of
from modelpack_engine.runner.model_runner import ModelRunner, make_runner
from modelpack_engine.runner.step import MaskOf, can_look_ahead
from modelpack_engine.sampling.sampler import Sampler
from modelpack_engine.speculation.draft import DraftProposer
from modelpack_engine.speculation.ngram import NgramProposer


class Proposer(Protocol):
    """Guesses tokens. A wrong guess costs time, and never changes an output."""

    def expects(self, sequences: Iterable[Sequence]) -> bool:
        """Return whether proposals are likely, by the tokens known so far; cheap.

        There may be a token in flight: to propose anything, the engine has to wait for it.
        """
        ...

    def propose(self, lengths: Mapping[Sequence, int]) -> Mapping[Sequence, list[int]]:
        """Return at most so many tokens for each sequence, none of which has tokens in flight."""
        ...

    def release(self, seq_ids: Iterable[int]) -> None:
        """Drop what is kept for sequences that ended or were preempted."""
        ...


def check_same_vocabulary(target: Tokenizer, draft: Tokenizer) -> None:
    """Raise `EngineError`, naming the first difference, unless ids mean the same to both.

    One vocabulary may go on after the other's end: models of one family differ so in size.
    """
    shared = min(target.num_ids, draft.num_ids)
    for token_id in range(shared):
        wanted, found = target.token_bytes(token_id), draft.token_bytes(token_id)
        if wanted != found:
            raise EngineError(
                f"the draft model has another vocabulary: token {token_id} is {found!r}, and "
                f"{wanted!r} in the model that it drafts for",
                hint="choose a smaller model of the same family, or --speculative-method ngram",
            )
    if shared < max(target.num_ids, draft.num_ids) // 2:
        raise EngineError(
            f"the draft model has {draft.num_ids} tokens, and the model that it drafts for "
            f"{target.num_ids}",
            hint="choose a smaller model of the same family, or --speculative-method ngram",
        )


class Speculator:
    """Asks a proposer for up to `num_tokens` tokens a sequence, while at most `max_batch` run."""

    def __init__(self, proposer: Proposer, *, num_tokens: int, max_batch: int) -> None:
        assert num_tokens > 0
        self.num_tokens = num_tokens
        self.max_batch = max_batch
        self.num_proposals = self.proposed_tokens = self.accepted_tokens = 0
        self._proposer = proposer
        self._lengths: dict[int, int] = {}  # by seq_id, how many tokens are proposed next

    @property
    def most_rows(self) -> int:
        """The most decode rows of a step with proposals."""
        return self.max_batch * (1 + self.num_tokens)

    def worth_waiting(self, sequences: Tokens[Sequence]) -> bool:
        """Return whether to wait for the tokens in flight of `sequences`, which decode."""
        return self._may(sequences) and self._proposer.expects(sequences)

    def propose(self, sequences: Tokens[Sequence], mask_of: MaskOf) -> Proposed:
        """Return proposals for some of `sequences`, which decode, with no token in flight.

        None for those whose masks cannot look ahead.
        """
        if not self._may(sequences):
            return {}
        lengths = {}
        for sequence in sequences:
            room = sequence.max_num_tokens - sequence.num_tokens - 1
            length = min(self._lengths.get(sequence.seq_id, self.num_tokens), room)
            if length > 0 and can_look_ahead(mask_of(sequence)):
                lengths[sequence] = length
        return self._proposer.propose(lengths) if lengths else {}

    def verified(self, proposal: Proposal, num_accepted: int, *, spoilt: bool = False) -> None:
        """Take note of how many tokens of a proposal were right.

        All of them: the next is longer. Else it is as long as what was right, and one more. After
        one that `spoilt` its step there is none.
        """
        proposed = len(proposal.token_ids)
        self.num_proposals += 1
        self.proposed_tokens += proposed
        self.accepted_tokens += num_accepted
        length = 2 * proposed if num_accepted == proposed else num_accepted + 1
        self._lengths[proposal.sequence.seq_id] = 0 if spoilt else min(length, self.num_tokens)

    def counted(self, stats: EngineStats) -> EngineStats:
        """Return `stats` with what was proposed since the start."""
        return replace(
            stats,
            num_proposals=self.num_proposals,
            proposed_tokens=self.proposed_tokens,
            accepted_tokens=self.accepted_tokens,
        )

    def release(self, seq_ids: Iterable[int]) -> None:
        """Forget sequences that ended or were preempted."""
        for seq_id in seq_ids:
            self._lengths.pop(seq_id, None)
        self._proposer.release(seq_ids)

    def _may(self, sequences: Tokens[Sequence]) -> bool:
        return 0 < len(sequences) <= self.max_batch


#: Tokens proposed at a time: a lookup is free, and what it finds is right for long or not at all.
NGRAM_TOKENS = 8
DRAFT_TOKENS = 4
#: More sequences than these make it a loss: measured in benchmarks/results/speculative.md.
MAX_BATCH = 4


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft model, and how its KV cache is laid out."""

    loaded: LoadedModel
    layout: ModelLayout

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a token takes in its KV cache."""
        return self.layout.bytes_per_token


def check_draft(
    config: EngineConfig, target: LoadedModel, draft: LoadedModel | None
) -> Draft | None:
    """Return the draft model that `config` asks for, None if it asks for none.

    Raises `EngineError` if there is none, if it has another vocabulary than `target`, or state
    that cannot go back to an earlier token.
    """
    if config.speculation != "draft":
        return None
    if draft is None:
        raise EngineError(
            "speculation with a draft model was asked for, and no draft model is loaded",
            hint="name one: --draft-model REF",
        )
    check_same_vocabulary(target.tokenizer, draft.tokenizer)
    layout = layout_of(draft.model)
    if layout is None or layout.recurrent or not layout.bytes_per_token:
        raise EngineError(
            f"the draft model, {draft.architecture}, keeps more than keys and values: it cannot go "
            "back to where a proposal was wrong",
            hint="choose a model with attention only",
        )
    return Draft(draft, layout)


def make_speculator(
    config: EngineConfig,
    draft: Draft | None,
    runner: ModelRunner,
    sampler: Sampler,
    sizes: Sizes,
    vocab_size: int,
) -> tuple[Speculator | None, tuple[str, ...]]:
    """Return what `config` asks for, None if that is nothing or not possible; and notes on it."""
    if config.speculation is None:
        return None, ()
    if not runner.can_go_back:
        return None, ("no speculation: its state cannot go back to where a proposal was wrong",)
    max_batch = config.speculative_disable_by_batch_size
    max_batch = min(MAX_BATCH if max_batch is None else max_batch, config.max_num_seqs)
    if draft is None:
        num_tokens = config.num_speculative_tokens or NGRAM_TOKENS
        return Speculator(NgramProposer(), num_tokens=num_tokens, max_batch=max_batch), ()
    num_tokens = config.num_speculative_tokens or DRAFT_TOKENS
    per_sequence = -(-(sizes.max_model_len + num_tokens) // config.block_size)
    num_blocks = max(2, min(sizes.num_blocks, max_batch * per_sequence + 1))
    small = make_runner(
        draft.loaded.model,
        num_blocks=num_blocks,
        block_size=config.block_size,
        buckets=sizes.buckets,
        self_test=config.self_test,
    )
    if not small.can_go_back:
        return None, (f"no speculation: the draft model runs as {small.tier}",)
    if config.warm_up and on_gpu():
        small.warm_up(sizes.step_shapes(config, 2 * max_batch))
    proposer = DraftProposer(
        small,
        sampler,
        BlockManager(
            num_blocks,
            config.block_size,
            model_id="draft",
            enable_prefix_caching=config.enable_prefix_caching,
        ),
        vocab_size=vocab_size,
        draft_vocab_size=draft.layout.vocab_size,
        context_length=draft.loaded.context_length,
        max_rows=sizes.max_num_batched_tokens,
        min_probability=config.speculative_min_acceptance,
    )
    return Speculator(proposer, num_tokens=num_tokens, max_batch=max_batch), small.notes
