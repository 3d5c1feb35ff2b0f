"""Constraints (JSON schemas, regular expressions, grammars) compiled to token masks by llguidance.

`compile_constraint` is the entry point. `prepared` checks the size of a JSON schema and sets its
whitespace policy: at most a line break and an indentation, or one space. Formatted JSON never
needs more, and a model that may always add whitespace can do so without end.
"""

from __future__ import annotations

import json
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from modelpack_engine.errors import (
    RETRY_AFTER,
    EngineError,
    QueueFullError,
    RequestError,
    as_error,
    no_panics,
)
from modelpack_engine.models.tokenizer import Tokenizer
from modelpack_server.structured_output.closed_objects import BY_NAME, DATA, close_objects

#: Characters of one schema. The compiler recurses along references: see `on_deep_stack`.
MAX_SCHEMA = 128 << 10
#: Characters of all patterns of a schema together: their cost grows quadratically.
MAX_PATTERNS = 8 << 10
#: Optional properties of one object. Each needs four parser items at its start, of at most 2000
#: (`LLParserLimits.max_items_in_row`). Their cost grows quadratically.
MAX_OPTIONAL = 480
WHITESPACE = r"\x20|\n[\x20\t]{0,32}"

# Formats that the compiler knows. Others are annotations (JSON Schema 2020-12, validation, 7.2.1).
_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)
# Keywords that the compiler rejects, with values that constrain nothing. zod writes the first one.
_IDLE: Mapping[str, tuple[Any, ...]] = {
    "propertyNames": ({"type": "string"}, {}, True),
    "uniqueItems": (False,),
    "unevaluatedProperties": ({}, True),
    "unevaluatedItems": ({}, True),
}


def prepared(schema: object) -> dict[str, Any]:
    """Return a schema in the form for the compiler; `schema` is an object or its JSON text.

    Raises `RequestError` if it is invalid or too large.
    """
    if isinstance(schema, str):
        if len(schema) > MAX_SCHEMA:
            raise _refusal(f"it has {len(schema)} characters, expected up to {MAX_SCHEMA}")
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise _refusal(f"it is not JSON: {error}") from error
    if not isinstance(schema, Mapping):
        raise _refusal(f"it is a {type(schema).__name__}, expected an object")
    try:
        size = len(json.dumps(schema, allow_nan=False))
        patterns = sum(map(_pattern_size, _objects(schema)))
        result = _without_idle_words(close_objects(schema))
        optional = max(map(_optional, _objects(schema)))
    except (TypeError, ValueError, RecursionError) as error:
        raise _refusal(f"it is not JSON: {error}") from error
    if size > MAX_SCHEMA:
        raise _refusal(f"it has {size} characters, expected up to {MAX_SCHEMA}")
    if patterns > MAX_PATTERNS:
        raise _refusal(f"its patterns have {patterns} characters, expected up to {MAX_PATTERNS}")
    if optional > MAX_OPTIONAL:
        raise _refusal(
            f"an object has {optional} optional properties, expected up to {MAX_OPTIONAL}",
            hint="list properties in `required`, or nest them in several objects",
        )
    options = {"whitespace_pattern": WHITESPACE, "item_separator": ",", "key_separator": ":"}
    result["x-guidance"] = options
    return result


def _refusal(reason: str, hint: str | None = None) -> RequestError:
    return RequestError(
        f"the JSON schema cannot be compiled: {reason}", param="response_format", hint=hint
    )


def _objects(value: object) -> Iterator[Mapping[str, Any]]:
    """Yield each object within a JSON value."""
    if isinstance(value, Mapping):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _objects(part)


def _pattern_size(schema: Mapping[str, Any]) -> int:
    pattern, named = schema.get("pattern"), schema.get("patternProperties")
    size = len(pattern) if isinstance(pattern, str) else 0
    return size + (sum(map(len, named)) if isinstance(named, Mapping) else 0)


def _optional(schema: Mapping[str, Any]) -> int:
    """Return the number of optional properties of an object schema."""
    named, required = schema.get("properties"), schema.get("required")
    if not isinstance(named, Mapping):
        return 0
    patterns = schema.get("patternProperties")
    more = len(patterns) if isinstance(patterns, Mapping) else 0
    needed = set(map(str, required)) if isinstance(required, list) else set()
    return len(named.keys() - needed) + more


def _without_idle_words(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema without keywords that constrain nothing and that the compiler rejects."""

    def walk(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _without_idle_words(value)
        return [walk(part) for part in value] if isinstance(value, list) else value

    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "format" and isinstance(value, str) and value not in _FORMATS:
            continue
        if key in _IDLE and value in _IDLE[key]:
            continue
        if key in BY_NAME and isinstance(value, Mapping):
            result[key] = {name: walk(part) for name, part in value.items()}
        else:
            result[key] = value if key in DATA else walk(value)
    return result


@dataclass(frozen=True, slots=True)
class Constraint:
    """A constraint on the whole reply.

    `value` is unused for "json_object". For "json_schema" it is a JSON schema (an object or its
    text), for "regex" a regular expression that matches the whole reply (Rust's syntax, without
    look-around; `\\d` is 0 to 9), for "grammar" a grammar in Lark or llama.cpp's GBNF.

    `markup` defines additional rules of a Lark grammar by their text, in which special tokens count
    as tokens. `until` defines rules that match any text up to and including such a text. A grammar
    with markup describes the whole reply.
    """

    kind: Literal["json_object", "json_schema", "regex", "grammar"]
    value: str | Mapping[str, Any] = ""
    markup: Mapping[str, str] = field(default_factory=dict)
    until: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReasoningBlock:
    """A block of reasoning before the constrained part of a reply.

    The block ends with `closing`. With an `opening` the block is optional; without one, the prompt
    has opened it. `answer` is markup before the constrained part, with or without a block, unless
    the constraint has its own markup. Special tokens in these texts count as tokens.
    """

    closing: str
    opening: str | None = None
    answer: str = ""


T = TypeVar("T")

LIMITS = LLParserLimits(verbose_errors=False)
_STACK = 512 << 20  # address space; the system provides memory on use
_one_at_a_time = threading.Lock()


def on_deep_stack(work: Callable[[], T]) -> T:
    """Run `work` in a thread with a large stack; return its result or raise its exception.

    Raises `QueueFullError` if the system has no memory for the stack.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            done.set_exception(error)

    thread = threading.Thread(target=run, name="grammar-compiler", daemon=True)
    with _one_at_a_time:
        before = threading.stack_size(_STACK)  # also applies to threads that others start now
        try:
            thread.start()
        except RuntimeError as error:
            raise QueueFullError(
                f"compiling the grammar failed: no memory for a stack of {_STACK >> 20} MiB",
                retry_after=RETRY_AFTER,
            ) from error
        finally:
            threading.stack_size(before)
        thread.join()
    if (failure := done.exception()) is not None:
        raise as_error(failure, "compiling the grammar") from failure
    return done.result()


_PREFIX = "\x02"  # tokenizers never merge it with its neighbours


class GrammarVocabulary:
    """The vocabulary for grammars; create it with `grammar_vocabulary`.

    Masks never allow ids without a token or beyond the model's logits.
    """

    @no_panics("reading the vocabulary")
    def __init__(self, tokenizer: Tokenizer, vocab_size: int | None = None) -> None:
        """Raises `RequestError` if the model has no end-of-text token."""
        size = min(tokenizer.num_ids, vocab_size or tokenizer.num_ids)
        ends = sorted(at for at in tokenizer.eos_token_ids if 0 <= at < size)
        if not ends:
            raise RequestError(
                "structured output requires an end-of-text token, which this model does not have",
                param="response_format",
            )
        special = sorted(at for at in tokenizer.special_token_ids if at < size)
        self._special = {tokenizer.token_text(at): at for at in special}
        texts = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts))) if texts else None
        source = _Source(tokenizer, size, ends[0], special)
        self.tokenizer = LLTokenizer(TokenizerWrapper(source), n_vocab=size, eos_token=ends)
        self._made_of = weakref.ref(tokenizer), vocab_size

    def __reduce__(self) -> tuple[Callable[..., GrammarVocabulary], tuple[Any, ...]]:
        """Pickle the tokenizer: the vocabulary is made again."""
        tokenizer, vocab_size = self._made_of
        return grammar_vocabulary, (tokenizer(), vocab_size)

    def special_token(self, text: str) -> int | None:
        """Return the id of the special token with this text, or None."""
        return self._special.get(text)

    def markup(self, text: str) -> str:
        """Return a Lark expression for `text`, in which special tokens count as tokens."""
        return " ".join(self.markup_parts(text)) or '""'

    def markup_parts(self, text: str) -> list[str]:
        """Return the terms of that expression: special tokens and the strings between them."""
        parts, at = [], 0
        for found in self._pattern.finditer(text) if self._pattern else ():
            parts += [quoted(text[at : found.start()]), f"<[{self._special[found[0]]}]>"]
            at = found.end()
        return [part for part in [*parts, quoted(text[at:])] if part]


def quoted(text: str) -> str:
    """Return text as a Lark string; "" for no text."""
    return json.dumps(text, ensure_ascii=False) if text else ""


class _Source:
    """A tokenizer as llguidance needs it: the bytes of its tokens, and a tokenization function.

    It refers to the tokenizer weakly, because the tokenizer refers to this object.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, eos: int, special: list[int]) -> None:
        self._tokenizer = weakref.ref(tokenizer)
        self.eos_token_id = eos
        self.bos_token_id = tokenizer.bos
        self.special_token_ids = special
        self.tokens = [tokenizer.token_bytes(at) for at in range(size)]

    def __call__(self, data: bytes) -> list[int]:
        """Return the tokens of a text that continues another text.

        SentencePiece adds a space before a text. This method therefore prepends a character and
        removes its token.
        """
        text = data.decode(errors="replace")
        tokenizer = self._tokenizer()
        assert tokenizer is not None, "the model was unloaded while a grammar runs"
        if not tokenizer.strips_leading_space:
            return tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        ids = tokenizer.encode(_PREFIX + text, add_special_tokens=False, parse_special=False)
        prefix = b""
        while ids and not prefix.endswith(_PREFIX.encode()):
            prefix += tokenizer.token_bytes(ids.pop(0))
        return ids


_known: weakref.WeakKeyDictionary[Tokenizer, dict[int | None, GrammarVocabulary]] = (
    weakref.WeakKeyDictionary()
)
_lock = threading.Lock()


def grammar_vocabulary(tokenizer: Tokenizer, vocab_size: int | None = None) -> GrammarVocabulary:
    """Return the vocabulary of a tokenizer; for a large one, the first call takes a second.

    `vocab_size` is the width of the model's logits, which may differ from the tokenizer's. Raises
    `RequestError` if there is no end-of-text token.
    """
    with _lock:
        made = _known.setdefault(tokenizer, {})
        if vocab_size not in made:
            made[vocab_size] = GrammarVocabulary(tokenizer, vocab_size)
        return made[vocab_size]


MAX_REGEX = 4 << 10  # characters; the cost of compiling grows quadratically
MAX_GRAMMAR = 16 << 10
_MAX_REASON = 500
_guarded = no_panics("the grammar")
#: Matches the compiler's message for an exceeded limit of `LIMITS`, not for its misuse.
_LIMIT = re.compile(r"too (many|big)|; max is|fuel|exceed|lexer error", re.IGNORECASE)
_TEXT = "TEXT: /(.|\\n)*/"
_NAMES = {
    "json_object": "JSON",
    "json_schema": "the JSON schema",
    "regex": "the regular expression",
}


class GrammarMask:
    """A `LogitsMask` with the tokens that the grammar allows after those of one choice.

    At the end of the grammar it allows end-of-text tokens only.
    """

    def __init__(self, matcher: LLMatcher, what: str, param: str) -> None:
        self._matcher = matcher
        self._what = what
        self._param = param

    @_guarded
    def allowed(self) -> bytes:
        """Return one bit per token id.

        Raises `RequestError` with the constraint and its `param` if the constraint is too complex
        to continue, and `EngineError` if `accept` got a token that was not allowed.
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
        """Advance by a token; after one that is not allowed, `allowed` raises."""
        self._matcher.consume_token(token_id)

    @_guarded
    def copy(self) -> GrammarMask:
        return GrammarMask(self._matcher.deep_copy(), self._what, self._param)

    @property
    @_guarded
    def is_complete(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()


class Grammar:
    """A compiled constraint for any number of concurrent choices.

    `compile_again` returns an equal grammar. It is what is pickled: an engine in another process
    compiles the constraint there.
    """

    def __init__(
        self, matcher: LLMatcher, what: str, param: str, compile_again: Callable[[], Grammar]
    ) -> None:
        self._matcher = matcher
        self._what = what
        self._param = param
        self._compile_again = compile_again

    def __reduce__(self) -> tuple[Callable[[], Grammar], tuple[()]]:
        return self._compile_again, ()

    @_guarded
    def mask(self) -> GrammarMask:
        """Return the mask for a new choice: a value for `SamplingParams.mask`."""
        return GrammarMask(self._matcher.deep_copy(), self._what, self._param)


def compile_constraint(
    constraint: Constraint,
    vocabulary: GrammarVocabulary,
    *,
    reasoning: ReasoningBlock | None = None,
    calls: Constraint | None = None,
    param: str = "response_format",
) -> Grammar:
    """Compile a constraint, which takes milliseconds, or seconds at worst.

    `reasoning` may precede the constrained part, and `calls` (from `tool_grammar`) may replace it.
    Raises `RequestError` with `param` and the compiler's reason if the constraint is invalid, too
    large, or matches no text.
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
            matcher.compute_bitmask()  # detects that no text matches, and precomputes
        return matcher

    try:
        matcher = on_deep_stack(compiled)
    except (ValueError, RecursionError, GbnfToLarkError) as error:
        if isinstance(error, RequestError):
            raise RequestError(str(error), param=param, hint=error.hint) from error
        raise RequestError(f"{what} cannot be compiled: {error}", param=param) from error
    if matcher.is_error():
        raise RequestError(f"{what} cannot be compiled: {_reason(matcher)}", param=param)
    again = partial(
        compile_constraint, constraint, vocabulary, reasoning=reasoning, calls=calls, param=param
    )
    return Grammar(matcher, what, param, again)


def _body(constraint: Constraint, vocabulary: GrammarVocabulary) -> dict[str, Any]:
    """Return the constraint as an entry of llguidance's list of grammars."""
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
    if constraint.markup:  # made by `tool_grammar`
        rules = [f"{name}: {vocabulary.markup(text)}" for name, text in constraint.markup.items()]
        for name, closing in constraint.until.items():
            rules += _until(name, closing, vocabulary)
        return {"lark_grammar": "\n".join([value, *rules, _TEXT])}
    _check_size(value, MAX_GRAMMAR)
    return {"lark_grammar": any_to_lark(value)}


def _until(name: str, closing: str, vocabulary: GrammarVocabulary) -> list[str]:
    """Return rules that match any text up to and including `closing`; the first is `name`.

    A text `closing` may begin within a token; a special token cannot.
    """
    first, *others = vocabulary.markup_parts(closing)
    option = "" if first.startswith("<[") else "[lazy]"
    return [" ".join([f"{name}: {name}_head", *others]), f"{name}_head{option}: TEXT {first}"]


def _around(reasoning: ReasoningBlock, answer: str, vocabulary: GrammarVocabulary) -> str:
    """Return a grammar of a block of reasoning followed by `answer`."""
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
    """Return the first lines of the compiler's message, which contain the place."""
    text = matcher.get_error().removesuffix("<non-verbose/>").strip()
    if "NoExtension" in text:
        text = "no text matches"
    return text[:_MAX_REASON]
