"""Constraints compile or are refused, and masks allow only text that matches them."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from modelpack_engine.errors import EngineError, RequestError
from modelpack_engine.models.tokenizer import Tokenizer
from modelpack_server.structured_output import (
    Constraint,
    GrammarMask,
    GrammarVocabulary,
    ReasoningBlock,
    compile_constraint,
    grammar_vocabulary,
)
from modelpack_server.structured_output.grammar import (
    MAX_GRAMMAR,
    MAX_OPTIONAL,
    MAX_PATTERNS,
    MAX_REGEX,
    MAX_SCHEMA,
)
from tests.engine.serving.tiny import tiny_tokenizer
from tests.engine.structured.conftest import WIDTH
from tests.engine.structured.walking import accepts, bits_of, take, walk

pytestmark = pytest.mark.weights

CLOSED = {"type": "object", "additionalProperties": False}
PERSON = CLOSED | {
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["é", "naïve", "東京"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
}
TREE = {
    "$defs": {
        "node": CLOSED
        | {
            "properties": {"v": {"type": "boolean"}, "next": {"$ref": "#/$defs/link"}},
            "required": ["v", "next"],
        },
        "link": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
    },
    "$ref": "#/$defs/node",
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": PERSON,
    "recursive": TREE,
    "number": {"type": "number", "minimum": -1, "maximum": 1},
    "union": {"anyOf": [{"const": None}, {"type": "boolean"}, {"enum": [1, "1", [1]]}]},
    "pattern": {"type": "string", "pattern": "^[a-f]{3}-[0-9]{2}$"},
    "date": {"type": "string", "format": "date"},
    "unknown format": {"type": "string", "format": "x-colour", "maxLength": 3},
    "idle words": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "propertyNames": {"type": "string"},
        "properties": {"uniqueItems": {"type": "array", "uniqueItems": False, "maxItems": 0}},
        "required": ["uniqueItems"],
        "additionalProperties": {"type": "null"},
    },
    "property called format": CLOSED
    | {"properties": {"format": {"enum": ["int32"]}}, "required": ["format"]},
    "tuple": {"type": "array", "prefixItems": [{"const": 1}, {"const": "b"}], "items": False},
}
REGEXES = [
    r"[a-c]{2,5}-\d+",
    "(yes|no|maybe)",
    "a\nb/c\\n?",
    "é[一-龥]{3}",
    r"a/b\"?",
    "^x{0,3}$",
    r"[\x20-\x7e]{1,9}",
]
GRAMMARS = {
    'start: "a" b\nb: "é" | "1" b': "a1*é",
    'root ::= "a" b\nb ::= "é" | "1" b': "a1*é",
    'start: NUMBER ("+" NUMBER)~1..3\nNUMBER: /[0-9]{1,3}/': r"\d{1,3}(\+\d{1,3}){1,3}",
}


def schema(value: object) -> Constraint:
    return Constraint("json_schema", value)  # type: ignore[arg-type]


@pytest.mark.sample(7)
@pytest.mark.parametrize("name", SCHEMAS)
def test_walks_through_a_schema_are_valid(
    name: str, vocabulary: GrammarVocabulary, tokenizer: Tokenizer
) -> None:
    grammar = compile_constraint(schema(SCHEMAS[name]), vocabulary)
    found = [walk(grammar, tokenizer, seed) for seed in range(6)]
    assert any(text is not None for text in found)
    for text in found:
        if text is not None:
            jsonschema.validate(json.loads(text), SCHEMAS[name])


@pytest.mark.parametrize("regex", REGEXES)
def test_walks_through_a_regex_match(
    regex: str, vocabulary: GrammarVocabulary, tokenizer: Tokenizer
) -> None:
    grammar = compile_constraint(Constraint("regex", regex), vocabulary)
    for seed in range(6):
        text = walk(grammar, tokenizer, seed)
        assert text is not None
        assert re.fullmatch(regex, text)


@pytest.mark.parametrize(("source", "regex"), GRAMMARS.items(), ids=["lark", "gbnf", "repeat"])
def test_walks_through_a_grammar_match(
    source: str, regex: str, vocabulary: GrammarVocabulary, tokenizer: Tokenizer
) -> None:
    grammar = compile_constraint(Constraint("grammar", source), vocabulary)
    for seed in range(6):
        text = walk(grammar, tokenizer, seed)
        assert text is not None
        assert re.fullmatch(regex, text)


def test_walks_through_json_are_objects(
    vocabulary: GrammarVocabulary, tokenizer: Tokenizer
) -> None:
    grammar = compile_constraint(Constraint("json_object"), vocabulary)
    texts = [text for seed in range(5) if (text := walk(grammar, tokenizer, seed, 120))]
    assert texts
    assert all(isinstance(json.loads(text), dict) for text in texts)


@pytest.mark.parametrize("name", ["object", "recursive"])
def test_single_bytes_make_characters(name: str) -> None:
    tiny = tiny_tokenizer()
    grammar = compile_constraint(schema(SCHEMAS[name]), grammar_vocabulary(tiny))
    texts = [text for seed in range(6) if (text := walk(grammar, tiny, seed))]
    assert texts
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMAS[name])


def optional(count: int) -> dict[str, Any]:
    """An object with many optional properties, one of them a pattern for names with x."""
    named = {f"p{number}": {"type": "integer"} for number in range(count - 1)}
    required = {f"r{number}": {"type": "integer"} for number in range(600)}
    return {
        "type": "object",
        "properties": required | named,
        "required": list(required),
        "patternProperties": {"^x": {"type": "integer"}},
        "additionalProperties": True,
    }


REFUSED = [
    (schema({"type": "strin"}), "strin"),
    (schema({"allOf": [{"type": "string"}, {"type": "integer"}]}), "Unsatisfiable"),
    (schema({"not": {"type": "string"}}), "not"),
    (schema({"uniqueItems": True, "type": "array"}), "uniqueItems"),
    (schema({"$ref": "#"}), "no text"),
    (schema({"$ref": "https://example.com/schema"}), "https://example.com/schema"),
    (schema({"$ref": "#/$defs/nothing"}), "nothing"),
    (schema('{"type": '), "not JSON"),
    (schema("[1]"), "list"),
    (schema({"const": float("nan")}), "not JSON"),
    (schema({"const": object()}), "not JSON"),
    (schema({"enum": ["x" * MAX_SCHEMA]}), "characters"),
    (schema({"pattern": "x" * (MAX_PATTERNS + 1)}), "patterns"),
    (schema(optional(MAX_OPTIONAL + 1)), "481 optional properties"),
    (schema({"items": {"$ref": "#/$defs/a"}, "$defs": {"a": optional(999)}}), "999 optional"),
    (schema({"type": "string", "pattern": "(?=a)b"}), "look"),
    (Constraint("regex", "a["), "unclosed"),
    (Constraint("regex", r"\bfoo"), "lookaround"),
    (Constraint("regex", "x" * (MAX_REGEX + 1)), "characters"),
    (Constraint("regex", "a?" * 1000), "lexer"),
    (Constraint("regex", {}), "dict"),
    (schema('{"items":' * 400 + "{}" + "}" * 400), "recursion"),
    (Constraint("grammar", 'root ::= "a'), "the grammar cannot be compiled"),
    (Constraint("grammar", "A: /a/"), "Expected ::= at line 1"),
    (Constraint("grammar", "start: nothing"), "nothing"),
    (Constraint("grammar", "start: <|nothing|>"), "nothing"),
    (Constraint("grammar", "start: a\na: a a"), "no text"),
    (Constraint("grammar", "x" * (MAX_GRAMMAR + 1)), "characters"),
    (Constraint("grammar", "start: " + "(" * 7000 + '"a"' + ")" * 7000), "nested"),
]


@pytest.mark.parametrize(("constraint", "reason"), REFUSED)
def test_refusals_give_the_reason(
    constraint: Constraint, reason: str, vocabulary: GrammarVocabulary
) -> None:
    with pytest.raises(RequestError, match=re.escape(reason)) as caught:
        compile_constraint(constraint, vocabulary)
    assert caught.value.param == "response_format"
    assert len(str(caught.value)) < 1000


class Failed:
    """A matcher that has failed with a reason of llguidance."""

    def __init__(self, reason: str) -> None:
        self.get_error = lambda: reason

    def compute_bitmask(self) -> bytes:
        return b""

    def is_error(self) -> bool:
        return True


@pytest.mark.parametrize(
    "reason",
    [
        "lexer error: too many states: 250000 >= 250000",
        "initial lexer configuration (grammar) too big (limit for this grammar: 1000000)",
        "fuel exhausted when checking relevance of lexemes (12)",
        "Current row has 2001 items; max is 2000; consider making your grammar left-recursive",
    ],
)
def test_limits_that_are_reached_later_are_the_request_s_mistake(reason: str) -> None:
    mask = GrammarMask(Failed(reason), "the grammar", "response_format")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="too complex to continue the answer") as caught:
        mask.allowed()
    assert caught.value.param == "response_format"
    misused = GrammarMask(Failed("token not allowed"), "the grammar", "x")  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="cannot be followed") as failed:
        misused.allowed()
    assert not isinstance(failed.value, RequestError)


@pytest.mark.long
def test_as_many_optional_properties_as_are_allowed(
    vocabulary: GrammarVocabulary, tokenizer: Tokenizer
) -> None:
    value = {f"r{number}": 1 for number in range(600)} | {"p1": 1, "p478": 2, "x": 3, "other": 4}
    grammar = compile_constraint(schema(optional(MAX_OPTIONAL)), vocabulary)
    assert accepts(grammar, tokenizer, json.dumps(value))


def test_deep_json_is_refused(vocabulary: GrammarVocabulary) -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"items": deep}
    with pytest.raises(RequestError, match="cannot be compiled"):
        compile_constraint(schema(deep), vocabulary)


def test_long_chains_of_references_do_not_overflow_the_stack(
    vocabulary: GrammarVocabulary, tokenizer: Tokenizer
) -> None:
    count = 1500
    defs: dict[str, Any] = {
        str(at): {"required": ["a"], "properties": {"a": {"$ref": f"#/$defs/{at + 1}"}}}
        for at in range(count)
    }
    defs[str(count)] = {"type": "integer"}
    compile_constraint(schema({"$defs": defs, "$ref": "#/$defs/0"}), vocabulary)
    rules = "".join(f"a{at}:a{at + 1}\n" for at in range(1200))
    grammar = compile_constraint(
        Constraint("grammar", f'start: a0\n{rules}a1200: "x"\n'), vocabulary
    )
    assert accepts(grammar, tokenizer, "x")


def test_whitespace_has_an_end(vocabulary: GrammarVocabulary, tokenizer: Tokenizer) -> None:
    grammar = compile_constraint(schema(PERSON), vocabulary)
    mask, spaces = grammar.mask(), 0
    take(mask, tokenizer, "{")
    while spaces < 100:
        blank = [t for t in bits_of(mask.allowed()) if tokenizer.token_bytes(t).isspace()]
        if not blank:
            break
        shortest = min(blank, key=lambda t: (len(tokenizer.token_bytes(t)), t))
        mask.accept(shortest)
        spaces += 1
    assert spaces <= 34
    pretty = json.dumps({"name": "Jo", "age": 3, "tags": ["é"]}, indent=4, ensure_ascii=False)
    assert accepts(grammar, tokenizer, pretty)


def test_a_complete_text_can_only_end(vocabulary: GrammarVocabulary, tokenizer: Tokenizer) -> None:
    mask = compile_constraint(Constraint("regex", "yes"), vocabulary).mask()
    assert not mask.is_complete
    take(mask, tokenizer, "yes")
    assert mask.is_complete
    assert set(bits_of(mask.allowed())) == tokenizer.eos_token_ids


def test_ids_beyond_the_tokenizer_or_the_logits_are_not_allowed(tokenizer: Tokenizer) -> None:
    constraint = Constraint("regex", r"(.|\n)*")
    wide = compile_constraint(constraint, grammar_vocabulary(tokenizer, WIDTH)).mask()
    assert max(bits_of(wide.allowed())) < tokenizer.num_ids < WIDTH
    narrow = compile_constraint(constraint, grammar_vocabulary(tokenizer, 1000)).mask()
    assert max(bits_of(narrow.allowed())) == 999
    assert grammar_vocabulary(tokenizer, WIDTH) is grammar_vocabulary(tokenizer, WIDTH)


def test_special_tokens_are_no_text(vocabulary: GrammarVocabulary, tokenizer: Tokenizer) -> None:
    mask = compile_constraint(Constraint("regex", r"(.|\n)*"), vocabulary).mask()
    allowed = set(bits_of(mask.allowed()))
    assert allowed & tokenizer.special_token_ids == tokenizer.eos_token_ids


def test_masks_of_one_grammar_share_nothing(
    vocabulary: GrammarVocabulary, tokenizer: Tokenizer
) -> None:
    grammar = compile_constraint(Constraint("regex", "(ab|cd)"), vocabulary)
    one, other = grammar.mask(), grammar.mask()
    take(one, tokenizer, "a")
    take(other, tokenizer, "cd")
    assert [other.is_complete, one.is_complete] == [True, False]
    take(one, tokenizer, "b")


def test_a_token_that_is_not_allowed_is_told(
    vocabulary: GrammarVocabulary, tokenizer: Tokenizer
) -> None:
    mask = compile_constraint(Constraint("regex", "yes"), vocabulary).mask()
    mask.accept(tokenizer.encode("no", add_special_tokens=False)[0])
    with pytest.raises(EngineError, match="cannot be followed"):
        mask.allowed()


THINK = ReasoningBlock("</think>", "<think>")


@pytest.mark.parametrize(
    ("block", "text", "expected"),
    [
        (THINK, "yes", True),
        (THINK, "<think>no { </thin</think>yes", True),
        (THINK, "<think>\nno\n</think>\n\nyes", True),
        (THINK, "<think>no", False),
        (THINK, "<think>no</think>no", False),
        (THINK, "no</think>yes", False),
        (ReasoningBlock("</think>"), "no</think>yes", True),
        (ReasoningBlock("</think>"), "東</think> yes", True),
        (ReasoningBlock("</think>"), "yes", False),
        (ReasoningBlock("</think>"), "no</think>\n\n\n\n\nyes", False),
        (ReasoningBlock("<|im_start|>"), "no<|im_start|>yes", True),
        (ReasoningBlock("<|im_end|>a", None, "<|im_start|>"), "n<|im_end|>a<|im_start|>yes", True),
        (ReasoningBlock("x<|im_start|>"), "nox<|im_start|>\nyes", True),
    ],
)  # fmt: skip
def test_reasoning_goes_before_the_grammar(
    block: ReasoningBlock,
    text: str,
    expected: bool,
    vocabulary: GrammarVocabulary,
    tokenizer: Tokenizer,
) -> None:
    grammar = compile_constraint(Constraint("regex", "yes"), vocabulary, reasoning=block)
    assert accepts(grammar, tokenizer, text) is expected


def test_reasoning_cannot_end_the_text(vocabulary: GrammarVocabulary, tokenizer: Tokenizer) -> None:
    grammar = compile_constraint(schema(PERSON), vocabulary, reasoning=ReasoningBlock("</think>"))
    mask = grammar.mask()
    take(mask, tokenizer, "Well.")
    allowed = set(bits_of(mask.allowed()))
    assert not allowed & tokenizer.special_token_ids
    assert len(allowed) > 49000
