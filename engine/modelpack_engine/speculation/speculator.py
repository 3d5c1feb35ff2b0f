"""Speculator: decide when to propose tokens and how many, and get them from a proposer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace
from typing import Protocol

import mlx.core as mx

from modelpack_engine.attention.paged import KVReader, PagedKV
from modelpack_engine.config import EngineConfig
from modelpack_engine.core.batch import StepBatch
from modelpack_engine.core.block_manager import BlockManager
from modelpack_engine.core.scheduler import Proposal, Proposed, SchedulerOutput
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.errors import EngineError
from modelpack_engine.models import LoadedModel
from modelpack_engine.models.assistant import AssistantHead, assistant_target
from modelpack_engine.models.eagle import EagleHead, check_target
from modelpack_engine.models.mtp import MtpHead
from modelpack_engine.models.tokenizer import Tokenizer
from modelpack_engine.outputs import EngineStats
from modelpack_engine.runner.hidden_states import HiddenRows, embeddings_of, layers_of
from modelpack_engine.runner.kv_cache_size import Sizes, max_num_seqs, on_gpu
from modelpack_engine.runner.model_layout import ModelLayout, layout_of
from modelpack_engine.runner.model_runner import ModelRunner, make_runner
from modelpack_engine.runner.paged import PagedRunner
from modelpack_engine.runner.replay import ReplayedTokens
from modelpack_engine.runner.step import MaskOf, can_look_ahead
from modelpack_engine.sampling.sampler import Sampler
from modelpack_engine.speculation.acceptance import HeadProposer, HeadWithLookup
from modelpack_engine.speculation.assistant import AssistantProposer
from modelpack_engine.speculation.draft import DraftProposer, num_state_rows
from modelpack_engine.speculation.eagle import EagleProposer
from modelpack_engine.speculation.head_layers import linear_of_rows
from modelpack_engine.speculation.head_runner import DraftWithin
from modelpack_engine.speculation.ngram import CPU_COST, GPU_COST, MOST_TOKENS, NgramProposer


class Proposer(Protocol):
    """Proposes tokens. A wrong proposal costs time, but never changes an output."""

    def expects(self, sequences: Iterable[Sequence]) -> bool:
        """Return whether proposals are likely for the known tokens, without computing them.

        A token may be in flight: the engine has to wait for it before it can propose.
        """

    def propose(self, lengths: Mapping[Sequence, int]) -> Mapping[Sequence, list[int]]:
        """Return up to `lengths[sequence]` tokens for each sequence; none has tokens in flight."""

    def release(self, seq_ids: Iterable[int]) -> None:
        """Drop the state of sequences that ended or were preempted."""


def check_same_vocabulary(target: Tokenizer, draft: Tokenizer) -> None:
    """Raise `EngineError`, naming the first difference, unless both map ids to the same tokens.

    One vocabulary may be longer than the other, as in models of one family.
    """
    shared = min(target.num_ids, draft.num_ids)
    for token_id in range(shared):
        wanted, found = target.token_bytes(token_id), draft.token_bytes(token_id)
        if wanted != found:
            raise EngineError(
                f"the draft model has another vocabulary: token {token_id} is {found!r}, expected "
                f"{wanted!r} as in the main model",
                hint="choose a smaller model of the same family, or --speculative-method ngram",
            )
    if shared < max(target.num_ids, draft.num_ids) // 2:
        raise EngineError(
            f"the vocabularies differ in size: {draft.num_ids} tokens in the draft model, "
            f"{target.num_ids} in the main model",
            hint="choose a smaller model of the same family, or --speculative-method ngram",
        )


class Speculator:
    """Proposes up to `num_tokens` tokens for each sequence, if at most `max_batch` decode.

    With `adapt`, the length depends on how many tokens of a sequence's last proposal were accepted.
    """

    def __init__(
        self, proposer: Proposer, *, num_tokens: int, max_batch: int, adapt: bool = True
    ) -> None:
        assert num_tokens > 0
        self._adapt = adapt
        self.num_tokens = num_tokens
        self.max_batch = max_batch
        self.num_proposals = self.proposed_tokens = self.accepted_tokens = 0
        self._proposer = proposer
        self._emitted = 0.0  # when the tokens of the last step were emitted
        self._lengths: dict[int, int] = {}  # by seq_id: how many tokens to propose next

    @property
    def may_replay(self) -> bool:
        """Whether steps may run as graphs: proposals need no other pools that MLX writes."""
        proposer = self._proposer
        if isinstance(proposer, HeadWithLookup):
            return isinstance(proposer.head, EagleProposer)
        return isinstance(proposer, NgramProposer)

    def reads_hidden(self, output: SchedulerOutput) -> bool:
        """Return whether the proposer reads the hidden states of a step."""
        return isinstance(self._proposer, HeadWithLookup) and (
            bool(output.prefill) or self._may(output.decoding)
        )

    def draft_within(self, output: SchedulerOutput, batch: StepBatch) -> DraftWithin | None:
        """Return a draft in the graph of a step that is not built yet, if a head has one."""
        if not (isinstance(self._proposer, HeadWithLookup) and self._may(output.sampled)):
            return None
        return self._proposer.draft_within(output, batch)

    def drafts(self, output: SchedulerOutput, within: DraftWithin, tokens: ReplayedTokens) -> None:
        """Note that the draft of `draft_within` runs in the graph of these tokens."""
        assert isinstance(self._proposer, HeadWithLookup)
        self._proposer.drafts(output, within, tokens)

    def next_proposals(
        self, sequences: Tokens[Sequence], tokens: Tokens[list[int]]
    ) -> list[list[int]] | None:
        """Do as `HeadWithLookup.next_proposals`; None without a head."""
        if not (isinstance(self._proposer, HeadWithLookup) and self._may(sequences)):
            return None
        return self._proposer.next_proposals(sequences, tokens)

    @property
    def most_rows(self) -> int:
        """The most decode rows that a step with proposals has."""
        return self.max_batch * (1 + self.num_tokens)

    def warm_up(self) -> None:
        """Compile the drafts of a head that has keys of its own."""
        proposer = self._proposer
        if isinstance(proposer, HeadWithLookup) and isinstance(proposer.head, EagleProposer):
            proposer.head.warm_up()

    def close(self) -> None:
        """Restore the draft model's layers."""
        if isinstance(self._proposer, DraftProposer):
            self._proposer.close()

    def worth_waiting(self, sequences: Tokens[Sequence]) -> bool:
        """Return whether to wait for the tokens in flight of these decoding sequences."""
        return self._may(sequences) and self._proposer.expects(sequences)

    def propose(self, sequences: Tokens[Sequence], mask_of: MaskOf) -> Proposed:
        """Return proposals for decoding sequences, which must have no tokens in flight.

        Sequences whose masks cannot be copied get no proposals.
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
        """Count the accepted tokens of a proposal, and choose the length of the next one.

        If all tokens were accepted, the next proposal is twice as long. Otherwise it is one token
        longer than the accepted ones. After NaN logits (`spoilt`) there are no more proposals.
        """
        proposed = len(proposal.token_ids)
        self.num_proposals += 1
        self.proposed_tokens += proposed
        self.accepted_tokens += num_accepted
        length = 2 * proposed if num_accepted == proposed else num_accepted + 1
        length = length if self._adapt else self.num_tokens
        self._lengths[proposal.sequence.seq_id] = 0 if spoilt else min(length, self.num_tokens)

    def record(
        self,
        output: SchedulerOutput,
        batch: StepBatch,
        hidden: HiddenRows | None,
        sampled: mx.array | None,
    ) -> None:
        """Hand the hidden states of a step that was built to the proposer, if it needs them.

        `sampled` int32 are the tokens of the sampled rows; None if they are not known yet.
        """
        if hidden is not None and isinstance(self._proposer, HeadWithLookup):
            self._proposer.record(output, batch, hidden, sampled)

    def launched(self) -> None:
        """Let the proposer launch its draft behind the recorded step, which was launched."""
        if isinstance(self._proposer, HeadWithLookup):
            self._proposer.head.launch()

    def emitted(self, output: SchedulerOutput, now: float) -> None:
        """Pass the proposer the duration of a step that emits its tokens at `now`.

        `now` is in seconds. Steps without prompts follow others at once, so they take the time
        since those.
        """
        before, self._emitted = self._emitted, now
        if isinstance(self._proposer, HeadWithLookup):
            self._proposer.stepped(output, now - before)

    def counted(self, stats: EngineStats) -> EngineStats:
        """Return `stats` with the counts of proposals."""
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


#: Tokens per proposal of a draft model, an EAGLE-3 head and other heads; lookups choose theirs.
DRAFT_TOKENS, EAGLE_TOKENS, HEAD_TOKENS = 4, 4, 3
#: With more sequences, speculation is slower: measured in benchmarks/results/speculative.md.
MAX_BATCH = 4


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft model and the layout of its KV cache."""

    loaded: LoadedModel
    layout: ModelLayout

    @property
    def weight_bytes(self) -> int:
        """The bytes of the draft model's weights."""
        return self.loaded.weight_bytes

    def state_bytes(self, config: EngineConfig) -> int:
        """Return the bytes of its recurrent states."""
        return _state_rows(config) * self.layout.bytes_per_sequence


#: Networks that draft from the model's hidden states.
DraftingHead = EagleHead | MtpHead | AssistantHead


def check_draft(
    config: EngineConfig, target: LoadedModel, draft: LoadedModel | DraftingHead | None
) -> Draft | DraftingHead | None:
    """Return the draft model or head for `config`; None if `config` does not use one.

    Raises `EngineError` if it is missing, if its vocabulary differs from `target`'s, or if it has
    no attention layers. A head is checked once the model's layers are known.
    """
    if config.speculation == "mtp":
        if isinstance(draft, MtpHead):
            return draft
        raise EngineError(
            "speculative method mtp: the model's layer for multi-token prediction is not loaded",
            hint="leave out --draft-model" if config.draft_model else None,
        )
    if config.speculation not in ("draft", "eagle3"):
        return None
    if config.speculation == "draft" and isinstance(draft, DraftingHead):
        return draft
    if isinstance(draft, EagleHead):
        return draft
    if config.speculation == "eagle3":
        raise EngineError(
            f"speculative method eagle3: {'no' if draft is None else 'the draft model is no'} "
            "EAGLE-3 head" + (" is loaded" if draft is None else ""),
            hint="choose one with --draft-model REF",
        )
    if draft is None:
        raise EngineError(
            "speculative method draft: no draft model is loaded",
            hint="choose one with --draft-model REF",
        )
    check_same_vocabulary(target.tokenizer, draft.tokenizer)
    layout = layout_of(draft.model)
    if layout is None or not layout.bytes_per_token:
        raise EngineError(
            f"{draft.architecture} cannot be a draft model: it has no layers with attention",
            hint="choose a draft model that has some",
        )
    return Draft(draft, layout)


def make_speculator(
    config: EngineConfig,
    draft: Draft | DraftingHead | None,
    runner: ModelRunner,
    sampler: Sampler,
    sizes: Sizes,
    vocab_size: int,
) -> tuple[Speculator | None, tuple[str, ...]]:
    """Return the speculator for `config`, or None if it is off or not possible, and notes."""
    if config.speculation is None:
        return None, ()
    if not runner.can_go_back:
        return None, ("no speculation: the model's state cannot return to an earlier token",)
    max_batch = _max_batch(config)
    if draft is None:
        num_tokens = config.num_speculative_tokens or MOST_TOKENS
        lookup = _lookup(runner)
        return Speculator(lookup, num_tokens=num_tokens, max_batch=max_batch, adapt=False), ()
    if isinstance(draft, DraftingHead):
        return _with_head(config, draft, runner, sizes, vocab_size, max_batch)
    num_tokens = _num_drafted(config)
    per_sequence = -(-(sizes.max_model_len + num_tokens) // config.block_size)
    num_blocks = max(2, min(sizes.num_blocks, max_batch * per_sequence + 1))
    small = make_runner(
        draft.loaded.model,
        num_blocks=num_blocks,
        block_size=config.block_size,
        buckets=sizes.buckets,
        self_test=config.self_test,
    )
    if not small.can_go_back or (draft.layout.recurrent and not isinstance(small, PagedRunner)):
        small.undo()
        return None, (f"no speculation: the draft model runs in the {small.tier} tier",)
    if isinstance(small, PagedRunner):
        small.expect_proposals()
        if on_gpu():
            small.adapted.rows.reserved = _state_rows(config)
    if config.warm_up and on_gpu():
        small.warm_up(sizes.step_shapes(config, 2 * max_batch))
    proposer = DraftProposer(
        small,
        sampler,
        BlockManager(
            num_blocks,
            config.block_size,
            model_id="draft",
            # A recurrent model would need a snapshot where a prefix ends.
            enable_prefix_caching=config.enable_prefix_caching and not draft.layout.recurrent,
        ),
        vocab_size=vocab_size,
        draft_vocab_size=draft.layout.vocab_size,
        context_length=draft.loaded.context_length,
        max_rows=sizes.max_num_batched_tokens,
        min_probability=config.speculative_min_acceptance,
    )
    return Speculator(proposer, num_tokens=num_tokens, max_batch=max_batch), small.notes


def _max_batch(config: EngineConfig) -> int:
    """Return the most sequences that get proposals together."""
    most = config.speculative_disable_by_batch_size
    return min(MAX_BATCH if most is None else most, max_num_seqs(config))


def _num_drafted(config: EngineConfig) -> int:
    """Return how many tokens a draft model proposes at most."""
    return config.num_speculative_tokens or DRAFT_TOKENS


def _state_rows(config: EngineConfig) -> int:
    """Return the states of a recurrent draft model, of all sequences together."""
    return _max_batch(config) * num_state_rows(_num_drafted(config))


def _lookup(runner: ModelRunner) -> NgramProposer:
    """Return the lookups for a runner; recurrent layers compute rows one after the other."""
    return NgramProposer(GPU_COST if on_gpu() and runner.snapshots is None else CPU_COST)


def _with_head(
    config: EngineConfig,
    head: DraftingHead,
    runner: ModelRunner,
    sizes: Sizes,
    vocab_size: int,
    max_batch: int,
) -> tuple[Speculator | None, tuple[str, ...]]:
    """Return the speculator of a head, whose hidden states `runner` then records.

    Raises `EngineError` if the head does not fit the model.
    """
    if not isinstance(runner, PagedRunner):
        return None, (
            f"no speculation: the {runner.tier} tier hands out no hidden states for the "
            f"{_NAMES[type(head)]}",
        )
    usual = EAGLE_TOKENS if isinstance(head, EagleHead) else HEAD_TOKENS
    num_tokens = config.num_speculative_tokens or usual
    proposer: HeadProposer
    if isinstance(head, AssistantHead):
        proposer = _assistant(config, head, runner, vocab_size, num_tokens, max_batch)
    else:
        proposer = _eagle(
            config, head, runner, vocab_size, num_tokens, max_batch, sizes.max_model_len
        )
    found = Speculator(
        HeadWithLookup(_lookup(runner), proposer, num_tokens),
        num_tokens=max(num_tokens, MOST_TOKENS),
        max_batch=max_batch,
        adapt=False,
    )
    return found, ()


_NAMES = {
    EagleHead: "EAGLE head",
    MtpHead: "multi-token-prediction layer",
    AssistantHead: "Gemma 4 drafter",
}


def _eagle(
    config: EngineConfig,
    head: EagleHead | MtpHead,
    runner: PagedRunner,
    vocab_size: int,
    num_tokens: int,
    max_batch: int,
    max_tokens: int,
) -> EagleProposer:
    """Return the proposer of a head that has keys and values of its own."""
    layers, embed = layers_of(runner.layout.inner), embeddings_of(runner.layout.inner)
    embedded = embed(mx.array([0]))
    if isinstance(head, EagleHead):
        check_target(head, hidden_size=embedded.shape[-1], vocab_size=vocab_size)
        head.set_dtype(embedded.dtype)
        read, reduce = head.config.layers_of(len(layers)), linear_of_rows(head.fc)
    else:
        head.set_dtype(embedded.dtype)
        read, reduce = (len(layers),), head.read
    runner.record_hidden(read, reduce)
    return EagleProposer(
        head,
        embed,
        num_tokens=num_tokens,
        max_sequences=max_batch,
        max_tokens=max_tokens,
        min_probability=config.speculative_min_acceptance,
        most_proposed=MOST_TOKENS,
        ahead=runner.writes_in_place,
    )


def _assistant(
    config: EngineConfig,
    head: AssistantHead,
    runner: PagedRunner,
    vocab_size: int,
    num_tokens: int,
    max_batch: int,
) -> AssistantProposer:
    """Return the proposer of Gemma 4's drafter, which reads the keys and values of the model."""
    caches = dict(enumerate(runner.adapted.caches))
    dims = {
        layer: (kv.layout.key_heads, kv.layout.key_dim)
        for layer, kv in caches.items()
        if isinstance(kv, PagedKV)
    }
    target = assistant_target(head, runner.layout.inner, vocab_size, dims)
    head.set_dtype(target.embed(mx.array([0])).dtype)
    runner.record_hidden((len(layers_of(runner.layout.inner)),), target.norm)
    readers = {kind: KVReader(caches[target.layers[kind]]) for kind in sorted({*head.layer_types})}
    return AssistantProposer(
        head,
        target,
        readers,
        num_tokens=num_tokens,
        max_sequences=max_batch,
        min_probability=config.speculative_min_acceptance,
        buckets=runner.buckets,
        compiled=not any(reader.kv.step.exact for reader in readers.values()),
    )
