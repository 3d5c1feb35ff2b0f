"""Grammar: a compiled constraint; GrammarMask: one choice's place in it."""

from __future__ import annotations

import json
import re
from typing import Any

from llguidance import LLMatcher, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from modelpack_engine.errors import EngineError, RequestError
from modelpack_engine.panics import no_panics
from modelpack_server.structured_output.compiling import LIMITS, on_deep_stack
from modelpack_server.structured_output.constraint import Constraint, ReasoningBlock
from modelpack_server.structured_output.schemas import prepared
from modelpack_server.structured_output.vocabulary import GrammarVocabulary

MAX_REGEX = 4 << 10  # characters; the cost of compiling grows with the square
MAX_GRAMMAR = 16 << 10
_MAX_REASON = 500
_guarded = no_panics("the grammar")
#: What the compiler says where a limit of `LIMITS` is reached, not where it is misused.
_LIMIT = re.compile(r"too many|; max is|fuel", re.IGNORECASE)
_TEXT = "TEXT: /(.|\\n)*/"
_NAMES = {
    "json_object": "JSON",
    "json_schema": "the JSON schema",
    "regex": "the regular expression",
}


class GrammarMask:
    """A `LogitsMask`: what the grammar allows after the tokens of one choice.

    Once the grammar can go no further, it allows the ends of a text and nothing else.
    """

    def __init__(self, matcher: LLMatcher, what: str, param: str) -> None:
        self._matcher = matcher
        self._what = what
        self._param = param

    @_guarded
    def allowed(self) -> bytes:
        """Return a bit per token id.

        Raises `RequestError`, naming the constraint and its `param`, if the constraint is too
        complex from here on, and `EngineError` if a token was accepted that was not allowed.
        """
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            reason = _reason(self._matcher)
            if _LIMIT.search(reason):
                text = f"{self._what} is too complex to continue the answer: {reason}"
                raise RequestError(text, param=self._param)
            raise EngineError(f"{self._what} cannot be followed: {reason}")
        return bits

    @_guarded
    def accept(self, token_id: int) -> None:
        """Go on by a token; one that is not allowed makes `allowed` raise."""
        self._matcher.consume_token(token_id)

    @_guarded
    def copy(self) -> GrammarMask:
        """Return a mask at the same place of the grammar."""
        return GrammarMask(self._matcher.deep_copy(), self._what, self._param)

    @property
    @_guarded
    def is_complete(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()


class Grammar:
    """A compiled constraint, which any number of choices may follow at once."""

    def __init__(self, matcher: LLMatcher, what: str, param: str) -> None:
        self._matcher = matcher
        self._what = what
        self._param = param

    @_guarded
    def mask(self) -> GrammarMask:
        """Return the mask of a choice that begins: what `SamplingParams.mask` asks for."""
        return GrammarMask(self._matcher.deep_copy(), self._what, self._param)


def compile_constraint(
    constraint: Constraint,
    vocabulary: GrammarVocabulary,
    *,
    reasoning: ReasoningBlock | None = None,
    calls: Constraint | None = None,
    param: str = "response_format",
) -> Grammar:
    """Compile a constraint, which takes milliseconds, and up to some seconds at worst.

    `reasoning` is what may come before the constrained part, `calls` (from `tool_grammar`) what may
    come instead of it. Raises `RequestError`, naming `param` and with the compiler's reason, if the
    constraint is no such thing, is too large, or matches no text at all.
    """
    what = _NAMES.get(constraint.kind, "the grammar")
    if param == "tools":
        what = "the schemas of the tools"

    def compiled() -> LLMatcher:
        parts = [_body(constraint, vocabulary) | {"name": "answer"}]
        answer = "@answer"
        if reasoning is not None and reasoning.answer and not constraint.markup:
            answer = f"{vocabulary.markup(reasoning.answer)} @answer"
        if calls is not None:
            parts.append(_body(calls, vocabulary) | {"name": "calls"})
            answer = f"({answer} | @calls)"
        if reasoning is not None:
            parts.insert(0, {"lark_grammar": _around(reasoning, answer, vocabulary)})
        elif calls is not None:
            parts.insert(0, {"lark_grammar": f"start: {answer}"})
        matcher = LLMatcher(
            vocabulary.tokenizer, json.dumps({"grammars": parts}), log_level=0, limits=LIMITS
        )
        if not matcher.is_error():
            matcher.compute_bitmask()  # finds that nothing matches, and does work ahead
        return matcher

    try:
        matcher = on_deep_stack(compiled)
    except (ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise RequestError(str(error), param=param, hint=error.hint) from error
        raise RequestError(f"{what} cannot be compiled: {error}", param=param) from error
    if matcher.is_error():
        raise RequestError(f"{what} cannot be compiled: {_reason(matcher)}", param=param)
    return Grammar(matcher, what, param)


def _body(constraint: Constraint, vocabulary: GrammarVocabulary) -> dict[str, Any]:
    """Return the grammar of the answer, as an entry of llguidance's list of grammars."""
    value = constraint.value
    if constraint.kind == "json_object":
        return {"json_schema": prepared({"type": "object"})}
    if constraint.kind == "json_schema":
        return {"json_schema": prepared(value)}
    if not isinstance(value, str):
        raise ValueError(f"it is a {type(value).__name__}, expected text")
    if constraint.kind == "regex":
        _check_size(value, MAX_REGEX)
        return {"lark_grammar": f"start: /{regex_to_lark(value, 'd')}/"}
    if constraint.markup:  # made by ourselves
        rules = [f"{name}: {vocabulary.markup(text)}" for name, text in constraint.markup.items()]
        for name, closing in constraint.until.items():
            rules += _until(name, closing, vocabulary)
        return {"lark_grammar": "\n".join([value, *rules, _TEXT])}
    _check_size(value, MAX_GRAMMAR)
    return {"lark_grammar": any_to_lark(value)}


def _until(name: str, closing: str, vocabulary: GrammarVocabulary) -> list[str]:
    """Return rules, the first of which is `name`: any text up to `closing`, and that.

    A closing that is text may begin within a token; a special token cannot be in a text.
    """
    first, *others = vocabulary.markup_parts(closing)
    option = "" if first.startswith("<[") else "[lazy]"
    return [" ".join([f"{name}: {name}_head", *others]), f"{name}_head{option}: TEXT {first}"]


def _around(reasoning: ReasoningBlock, answer: str, vocabulary: GrammarVocabulary) -> str:
    """Return the grammar of `answer` with a block of reasoning before it."""
    rules = [*_until("closed", reasoning.closing, vocabulary), _TEXT]
    rules.append("block: closed /[ \\n]{0,4}/")
    begin = "block"
    if reasoning.opening is not None:
        rules.append(f"opened: {vocabulary.markup(reasoning.opening)} block")
        begin = "opened?"
    return "\n".join([f"start: {begin} {answer}", *rules])


def _check_size(text: str, limit: int) -> None:
    if len(text) > limit:
        raise ValueError(f"it has {len(text)} characters, expected up to {limit}")


def _reason(matcher: LLMatcher) -> str:
    """Return what the compiler says: its first lines, which name the place."""
    text = matcher.get_error().removesuffix("<non-verbose/>").strip()
    if "NoExtension" in text:
        text = "no text matches"
    return text[:_MAX_REASON]
