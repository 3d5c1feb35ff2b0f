"""Hostile tokenizer.json files that panic, hang or grow, by the feature that they abuse."""

from __future__ import annotations

import base64
import copy
import json
import struct
from typing import Any

GOOD: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {"id": 0, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
    ],
    "normalizer": None,
    "pre_tokenizer": {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True
    },
    "post_processor": None,
    "decoder": {
        "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True
    },
    "model": {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "vocab": {"</s>": 0, "a": 1, "b": 2, "ab": 3}, "merges": ["a b"],
    },
}  # fmt: skip


def changed(**parts: Any) -> str:
    """Return the tokenizer.json with some parts replaced."""
    return json.dumps(copy.deepcopy(GOOD) | parts)


def _replace(pattern: dict[str, str], content: str, times: int) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": pattern, "content": content}
    return {"type": "Sequence", "normalizers": [step] * times}


def _model(**fields: Any) -> dict[str, Any]:
    return {**GOOD["model"], **fields}


def _charsmap(character: str, text: str) -> str:
    """Return SentencePiece's map of normalisations: a trie of one character, and its text."""
    units = [0] * 512
    units[0] = 256 << 10  # the root's children are from 256 on
    leaf = 256 ^ ord(character)
    units[leaf] = 3 << 10 | 1 << 8 | ord(character)
    units[leaf ^ 3] = 1 << 31  # the text at 0
    raw = struct.pack("<513I", 4 * len(units), *units) + text.encode() + b"\0"
    return base64.b64encode(raw).decode()


def _template(**parts: list[str]) -> dict[str, Any]:
    """Return a post-processor that concatenates these texts."""
    sequences = {
        name: [{"Sequence": {"id": part, "type_id": 0}} for part in listed]
        for name, listed in ({"single": ["A"], "pair": ["A", "B"]} | parts).items()
    }
    return {"type": "TemplateProcessing", **sequences, "special_tokens": {}}


_SEQUENCE = '{"type":"Sequence","normalizers":['
#: The file, and a part of the error.
HOSTILE = {
    "panic of a charsmap": (
        changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}),
        "out of bounds",
    ),
    "panic of a decoder": (
        changed(decoder={"type": "Strip", "content": "a", "start": 10**9, "stop": 10**9}),
        "out of bounds",
    ),
    "panic of a template": (
        changed(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        ),
        "tokenizer.json",
    ),
    "panic of a prefix": (
        changed(
            model=_model(
                continuing_subword_prefix="##########",
                vocab={"</s>": 0, "a": 1, "é": 2, "aé": 3},
                merges=["a é"],
            )
        ),
        "out of range",
    ),
    "no unknown token": (
        changed(model={"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]]}),
        "unk_id",
    ),
    "a pattern that backtracks": (
        changed(
            pre_tokenizer={
                "type": "Split", "pattern": {"Regex": "(a+)+$b"}, "behavior": "Isolated",
                "invert": False,
            }
        ),
        "retry-limit",
    ),
    "growing text": (
        changed(normalizer=_replace({"String": "☃"}, "☃" * 10, 9)),
        "1000000000 times as long",
    ),
    "growing by a pattern": (changed(normalizer=_replace({"Regex": ""}, "x" * 100, 1)), "101"),
    "growing by a map": (
        changed(
            normalizer={"type": "Precompiled", "precompiled_charsmap": _charsmap("Q", "xy" * 5000)}
        ),
        "10000 times as long",
    ),
    "a text many times": (
        changed(post_processor=_template(single=["A"] * 300)), "repeats a text (single)"
    ),
    "a pair many times": (
        changed(
            post_processor={
                "type": "Sequence", "processors": [_template(pair=["A", *["B"] * 300])]
            }
        ),
        "repeats a text (pair)",
    ),
    "many tokens around pairs": (
        changed(
            post_processor=_template() | {
                "pair": [
                    *_template()["pair"],
                    *[{"SpecialToken": {"id": "</s>", "type_id": 0}}] * 5000,
                ],
                "special_tokens": {"</s>": {"id": "</s>", "ids": [0], "tokens": ["</s>"]}},
            }
        ),
        "tokens to every pair",
    ),
    "quadratic words": (
        changed(
            model={
                "type": "WordPiece", "vocab": {"[UNK]": 0, "a": 1, "##a": 2}, "unk_token": "[UNK]",
                "continuing_subword_prefix": "##", "max_input_chars_per_word": 10**9,
            }
        ),
        "encoding 4000 characters took",
    ),
    "many tokens around": (
        changed(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}] * 5000
                + [{"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [
                    {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
                ],
                "special_tokens": {"</s>": {"id": "</s>", "ids": [0], "tokens": ["</s>"]}},
            }
        ),
        "tokens to every text",
    ),
    "deeply nested": (
        '{"version":"1.0","normalizer":' + _SEQUENCE * 100_000 + "]}" * 100_000 + "}",
        "recursion",
    ),
    "cut off": (changed()[:-20], "EOF"),
}  # fmt: skip
