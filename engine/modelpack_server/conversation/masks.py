"""Token masks for the reasoning budget and for grammars that begin after reasoning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from modelpack_engine.errors import RequestError
from modelpack_engine.models.tokenizer import Tokenizer
from modelpack_engine.request import CopyableMask
from modelpack_server.conversation.spec import ChatSpec
from modelpack_server.structured_output import (
    Constraint,
    ReasoningBlock,
    compile_constraint,
    grammar_vocabulary,
    tool_grammar,
)
from modelpack_server.tool_parsers.families import OutputFormat
from modelpack_server.tool_parsers.parts import HARMONY, Tool

if TYPE_CHECKING:
    from modelpack_server.conversation.served_model import ServedModel


class ReasoningBudget:
    """A `LogitsMask` that limits reasoning; it may wrap another mask.

    It allows what `inner` allows until the block of reasoning has `budget` tokens, and then only
    the next token of the closing marker. `opening` is None if the prompt has opened the block.
    """

    def __init__(
        self,
        budget: int,
        tokens: Tokenizer,
        *,
        opening: str | None,
        closing: str,
        closing_ids: tuple[int, ...],
        inner: CopyableMask | None = None,
    ) -> None:
        self._budget = budget
        self._tokens = tokens
        self._opening = opening.encode() if opening is not None else None
        self._closing = closing.encode()
        self._forced = list(closing_ids)
        self._inner = inner
        self._text = b""
        self._reasons = opening is None
        self._ended = False
        self._spent = 0

    def allowed(self) -> bytes | None:
        """Return one bit per token id (LSB first), or None if every token is allowed."""
        if self._is_forced:
            token_id = self._forced[0]
            bits = bytearray(token_id // 8 + 1)
            bits[-1] = 1 << token_id % 8
            return bytes(bits)
        return self._inner.allowed() if self._inner is not None else None

    def accept(self, token_id: int) -> None:
        """Advance by the sampled token."""
        if self._inner is not None:
            self._inner.accept(token_id)
        if self._ended:
            return
        if self._is_forced:
            self._forced.pop(0)
            self._ended = not self._forced
            return
        self._text += self._tokens.token_bytes(token_id)
        if self._reasons:
            self._spent += 1
            self._ended = self._closing in self._text
        elif self._opening is not None and self._opening in self._text:
            self._reasons = True
            self._text = b""
        elif self._opening is not None and not self._opening.startswith(self._text.lstrip()):
            self._ended = True  # the reply began without reasoning

    def copy(self) -> ReasoningBudget:
        made = copy(self)
        made._forced = self._forced.copy()
        made._inner = self._inner.copy() if self._inner is not None else None
        return made

    @property
    def _is_forced(self) -> bool:
        return self._reasons and not self._ended and self._spent >= self._budget


MakeMask = Callable[[], CopyableMask]


def make_masks(
    model: ServedModel,
    spec: ChatSpec,
    format: OutputFormat,
    tools: Sequence[Tool],
    *,
    starts_reasoning: bool,
) -> MakeMask | None:
    """Return a function that makes a mask for each choice, or None if any text is allowed.

    A required call replaces `constraint`. An optional call is an alternative to text that matches
    `constraint`. Compiling may take seconds. Raises `RequestError` with the reason if it fails.
    """
    constraint, calls, param = spec.constraint, None, "response_format"
    if spec.tool_choice.mode == "required":
        constraint, param = _calls(spec, format, tools), "tools"
    elif constraint is not None and tools:
        calls = _optional_calls(spec, format, tools)
    make: MakeMask | None = None
    if constraint is not None:
        vocabulary = grammar_vocabulary(model.tokenizer, model.vocab_size)
        block = _block(format, starts_reasoning)
        make = compile_constraint(
            constraint, vocabulary, reasoning=block, calls=calls, param=param
        ).mask
    budget, markers = spec.reasoning_budget, format.reasoning
    if budget is None or markers is None:
        return make
    closing_ids = tuple(model.tokenizer.encode(markers.closing, add_special_tokens=False))

    return partial(
        _budgeted,
        make,
        budget,
        model.tokenizer,
        opening=None if starts_reasoning else markers.opening,
        closing=markers.closing,
        closing_ids=closing_ids,
    )


def _budgeted(
    make: MakeMask | None, budget: int, tokens: Tokenizer, **markers: Any
) -> ReasoningBudget:
    """Return a mask that limits reasoning; can be pickled, in a partial, for another process."""
    inner = make() if make is not None else None
    return ReasoningBudget(budget, tokens, **markers, inner=inner)


def text_mask(model: ServedModel, constraint: Constraint) -> MakeMask:
    """Return a function that makes masks for a plain completion, which has no reasoning."""
    vocabulary = grammar_vocabulary(model.tokenizer, model.vocab_size)
    return compile_constraint(constraint, vocabulary).mask


def _calls(spec: ChatSpec, format: OutputFormat, tools: Sequence[Tool]) -> Constraint:
    choice = replace(spec.tool_choice, mode="required")
    return tool_grammar(format, tools, choice, parallel=spec.parallel_tool_calls)


def _optional_calls(spec: ChatSpec, format: OutputFormat, tools: Sequence[Tool]) -> Constraint:
    """Return the grammar of optional calls, the alternative to the constrained text."""
    try:
        return _calls(spec, format, tools)
    except RequestError as error:
        if error.param == "tools":
            raise
        raise RequestError(
            "tools cannot be combined with response_format: this model's calls have no known"
            " format, so calls cannot be distinguished from text",
            param="response_format",
            hint='remove one of them, or use tool_choice "none"',
        ) from error


def _block(format: OutputFormat, starts_reasoning: bool) -> ReasoningBlock | None:
    """Return the reasoning block that may precede the constrained text, or None."""
    markers = format.reasoning
    if markers is None:
        return None
    opening = None if starts_reasoning else markers.opening
    if markers is HARMONY:  # each message has a header with its author and channel
        return ReasoningBlock(
            f"{markers.closing}<|start|>assistant", opening, "<|channel|>final<|message|>"
        )
    return ReasoningBlock(markers.closing, opening)
