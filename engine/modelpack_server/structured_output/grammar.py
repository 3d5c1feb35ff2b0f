"""JSON schemas for the grammar compiler: size checks and the whitespace policy.

A formatted JSON text has a line break and an indentation where whitespace may be, or a space. More
is never needed, and a model that may always add whitespace can go on for ever.
"""

from __future__ import annotations

import json
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from modelpack_engine.errors import EngineError, QueueFullError, RequestError, as_error, no_panics
from modelpack_engine.models.tokenizer import Tokenizer

#: Characters of one schema. The compiler recurses along references: see `compiling`.
MAX_SCHEMA = 128 << 10
#: Characters of all patterns of a schema together: their cost grows with the square.
MAX_PATTERNS = 8 << 10
#: Optional properties of one object. At its start the parser has four items for each, and up to
#: 2000 items: `LLParserLimits.max_items_in_row`. Their cost grows with the square.
MAX_OPTIONAL = 480
WHITESPACE = r"\x20|\n[\x20\t]{0,32}"

# Formats that the compiler knows. Others are annotations (JSON Schema 2020-12, validation, 7.2.1).
_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)
# Words that the compiler does not know, with values that say nothing: zod writes the first of them.
_IDLE: Mapping[str, tuple[Any, ...]] = {
    "propertyNames": ({"type": "string"}, {}, True),
    "uniqueItems": (False,),
    "unevaluatedProperties": ({}, True),
    "unevaluatedItems": ({}, True),
}
_DATA = frozenset({"const", "enum", "default", "examples", "x-guidance"})  # hold no schemas
_BY_NAME = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
)


def prepared(schema: object) -> dict[str, Any]:
    """Return a schema as it is compiled; `schema` is an object, or the text of one.

    Raises `RequestError` if it is no schema, or too large.
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
        patterns = sum(map(len, _patterns(schema)))
        result = _without_idle_words(schema)
        optional = max(_optional(schema), default=0)
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


def _patterns(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        pattern = value.get("pattern")
        if isinstance(pattern, str):
            yield pattern
        named = value.get("patternProperties")
        if isinstance(named, Mapping):
            yield from named
        for part in value.values():
            yield from _patterns(part)
    elif isinstance(value, list):
        for part in value:
            yield from _patterns(part)


def _optional(value: object) -> Iterator[int]:
    """Yield the number of optional properties of each object in a schema."""
    if isinstance(value, Mapping):
        named, required = value.get("properties"), value.get("required")
        if isinstance(named, Mapping):
            patterns = value.get("patternProperties")
            more = len(patterns) if isinstance(patterns, Mapping) else 0
            needed = set(map(str, required)) if isinstance(required, list) else set()
            yield len(named.keys() - needed) + more
        for part in value.values():
            yield from _optional(part)
    elif isinstance(value, list):
        for part in value:
            yield from _optional(part)


def _without_idle_words(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema without what constrains nothing, which the compiler would refuse."""

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
        if key in _BY_NAME and isinstance(value, Mapping):
            result[key] = {name: walk(part) for name, part in value.items()}
        else:
            result[key] = value if key in _DATA else walk(value)
    return result


@dataclass(frozen=True, slots=True)
class Constraint:
    """A constraint on the whole of an answer.

    `value` is nothing for "json_object", a JSON schema (an object or its text) for "json_schema", a
    regular expression that the answer matches from end to end for "regex" (Rust's syntax, without
    look-around; `\\d` is 0 to 9), and Lark or llama.cpp's GBNF for "grammar".

    `markup` defines further rules of a Lark grammar by their text: special tokens of the model's
    vocabulary in it stand for themselves, all else is plain text. `until` defines rules that are
    any text up to and including such a text. A grammar with markup brings all that an answer has.
    """

    kind: Literal["json_object", "json_schema", "regex", "grammar"]
    value: str | Mapping[str, Any] = ""
    markup: Mapping[str, str] = field(default_factory=dict)
    until: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReasoningBlock:
    """What may come before the part of an answer that is constrained.

    The block ends with `closing`. It may begin with `opening`, or be left out; without an `opening`
    the prompt has begun it already. `answer` is markup between it and the constrained part, which
    is there without a block as well, but not where the constraint brings its own markup. Special
    tokens in these texts stand for themselves.
    """

    closing: str
    opening: str | None = None
    answer: str = ""


T = TypeVar("T")

LIMITS = LLParserLimits(verbose_errors=False)
#: Seconds after which a request whose grammar found no memory may be sent again (Retry-After).
RETRY_AFTER = 1.0
_STACK = 512 << 20  # of address space: memory is taken as it is used
_one_at_a_time = threading.Lock()


def on_deep_stack(work: Callable[[], T]) -> T:
    """Return what `work` returns, or raise what it raises; it runs on a thread of its own.

    Raises `QueueFullError` if the system has no memory for the thread's stack.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="grammar-compiler", daemon=True)
    with _one_at_a_time:
        before = threading.stack_size(_STACK)  # also that of threads that others start now
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
    if errors:
        raise as_error(errors[0], "compiling the grammar") from errors[0]
    return results[0]


_PREFIX = "\x02"  # never joined with its neighbours


class GrammarVocabulary:
    """The tokens that grammars choose from; make it with `grammar_vocabulary`.

    Ids without a token, and those past the end of the model's logits, are never allowed.
    """

    @no_panics("reading the vocabulary")
    def __init__(self, tokenizer: Tokenizer, vocab_size: int | None = None) -> None:
        """Raises `RequestError` if the model has no token that ends a text."""
        size = min(tokenizer.num_ids, vocab_size or tokenizer.num_ids)
        ends = sorted(at for at in tokenizer.eos_token_ids if 0 <= at < size)
        if not ends:
            raise RequestError(
                "structured output needs a token that ends a text, and the model names none",
                param="response_format",
            )
        special = sorted(at for at in tokenizer.special_token_ids if at < size)
        self._special = {tokenizer.token_text(at): at for at in special}
        texts = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts))) if texts else None
        source = _Source(tokenizer, size, ends[0], special)
        self.tokenizer = LLTokenizer(TokenizerWrapper(source), n_vocab=size, eos_token=ends)

    def special_token(self, text: str) -> int | None:
        """Return the id of the special token with this text, if there is one."""
        return self._special.get(text)

    def markup(self, text: str) -> str:
        """Return a Lark expression for `text`, in which special tokens stand for themselves."""
        return " ".join(self.markup_parts(text)) or '""'

    def markup_parts(self, text: str) -> list[str]:
        """Return the terms of that expression: special tokens, and strings between them."""
        parts, at = [], 0
        for found in self._pattern.finditer(text) if self._pattern else ():
            parts += [quoted(text[at : found.start()]), f"<[{self._special[found[0]]}]>"]
            at = found.end()
        return [part for part in [*parts, quoted(text[at:])] if part]


def quoted(text: str) -> str:
    """Return text as a Lark string; "" for no text."""
    return json.dumps(text, ensure_ascii=False) if text else ""


class _Source:
    """What llguidance asks of a tokenizer: the bytes of its tokens, and how it cuts a text.

    It must not keep the tokenizer alive, which keeps this alive.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, eos: int, special: list[int]) -> None:
        self._tokenizer = weakref.ref(tokenizer)
        self.eos_token_id = eos
        self.bos_token_id = tokenizer.bos
        self.special_token_ids = special
        self.tokens = [tokenizer.token_bytes(at) for at in range(size)]

    def __call__(self, data: bytes) -> list[int]:
        """Return the tokens of a text that goes on after another.

        SentencePiece puts a space before texts: there, a character before it is cut off again.
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
    """Return the vocabulary of a tokenizer; the first call takes a second for a large one.

    `vocab_size` is the width of the model's logits, which may be more or less than the tokenizer
    has. Raises `RequestError` if no token ends a text.
    """
    with _lock:
        made = _known.setdefault(tokenizer, {})
        if vocab_size not in made:
            made[vocab_size] = GrammarVocabulary(tokenizer, vocab_size)
        return made[vocab_size]


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
