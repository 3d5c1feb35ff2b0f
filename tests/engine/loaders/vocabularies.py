"""Small vocabularies in GGUF, for tokenisers that need no download.

`golden/make.py` trained them once on a few pages of text: `bpe` has merges, `uncut` has merges
that cross the ends of words, and `spm` has scores.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import gguf
from tokenizers import pre_tokenizers

GOLDEN = Path(__file__).parent / "golden"

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def golden(name: str) -> Any:
    """Return the content of `golden/<name>.json`."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer in the metadata of a GGUF file."""

    model: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None = None
    scores: list[float] | None = None

    @classmethod
    def read(cls, name: str) -> Vocabulary:
        return cls(**golden(name))

    @classmethod
    def of_parts(cls, texts: Iterable[str], longest: int) -> Vocabulary:
        """Return a vocabulary of bytes and of all parts of `texts` up to `longest` bytes.

        Each part merges from any two, so a token ends where the text was split, or at `longest`.
        """
        split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokens = dict.fromkeys(["<|im_start|>", "<|im_end|>", *sorted(split.alphabet())])
        merges: list[list[str]] = [[] for _ in range(longest + 1)]
        for text in texts:
            ((raw, _),) = split.pre_tokenize_str(text)
            for start, size in product(range(len(raw)), range(2, longest + 1)):
                part = raw[start : start + size]
                if part not in tokens:
                    tokens[part] = None
                    merges[len(part)] += [f"{part[:at]} {part[at:]}" for at in range(1, len(part))]
        types = [CONTROL] * 2 + [NORMAL] * (len(tokens) - 2)
        return cls("gpt2", list(tokens), types, [merge for same in merges for merge in same])

    def id(self, token: str) -> int:
        return self.tokens.index(token)

    def with_merges(self, model: str) -> Vocabulary:
        """Return the same tokens for a tokenizer that has merges instead of scores."""
        assert self.scores is not None
        rows = zip(self.tokens, self.types, self.scores, strict=True)
        scores = {token: score for token, kind, score in rows if kind == NORMAL}
        merges = [
            (-score, f"{token[:at]} {token[at:]}")
            for token, score in scores.items()
            for at in range(1, len(token))
            if token[:at] in scores and token[at:] in scores
        ]
        merges.sort(key=lambda merge: merge[0])
        return replace(self, model=model, merges=[text for _, text in merges])

    def add_to(
        self, writer: gguf.GGUFWriter, *, pre: str | None, special: Iterable[str] = ()
    ) -> None:
        """Write the vocabulary; `special` maps the names of special tokens (bos, eos) to ids."""
        writer.add_tokenizer_model(self.model)
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        for name in special:
            token = {"bos": ("<s>", "<|im_start|>"), "eos": ("</s>", "<|im_end|>")}[name]
            found = next(at for at, text in enumerate(self.tokens) if text in token)
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", found)


def write_vocabulary(
    path: Path, vocabulary: Vocabulary, *, pre: str | None = "gpt-2", **flags: bool
) -> Path:
    """Write a GGUF file with a tokenizer and nothing else; `flags` are `tokenizer.ggml.*`."""
    writer = gguf.GGUFWriter(path, "llama")
    vocabulary.add_to(writer, pre=pre, special=("bos", "eos"))
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    finish(writer)
    return path


def finish(writer: gguf.GGUFWriter) -> None:
    """Write the file and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
