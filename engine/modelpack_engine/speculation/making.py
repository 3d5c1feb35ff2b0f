"""From an engine's configuration to its speculator."""

from __future__ import annotations

from dataclasses import dataclass

from modelpack_engine.adaptation.layout import ModelLayout, layout_of
from modelpack_engine.block_manager import BlockManager
from modelpack_engine.config import EngineConfig
from modelpack_engine.errors import EngineError
from modelpack_engine.loaders import LoadedModel
from modelpack_engine.model_runner import ModelRunner
from modelpack_engine.sampler import Sampler
from modelpack_engine.sizing import Sizes, on_gpu
from modelpack_engine.speculation.draft import DraftProposer
from modelpack_engine.speculation.ngram import NgramProposer
from modelpack_engine.speculation.speculator import Speculator
from modelpack_engine.speculation.vocabularies import check_same_vocabulary

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
    small = ModelRunner(
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
