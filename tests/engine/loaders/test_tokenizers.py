"""Token ids equal llama.cpp's for every kind of pre-tokeniser, on a corpus chosen to differ."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models import ModelFiles, Tokenizer, json_tokenizer
from modelpack_engine.models.gguf_file import GGUFFile
from modelpack_engine.models.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_of
from tests.engine.loaders.corpus import TEXTS
from tests.engine.loaders.vocabularies import (
    CONTROL,
    NORMAL,
    Vocabulary,
    finish,
    golden,
    write_vocabulary,
)

ANSWERS: dict[str, Any] = golden("tokens")
BYTE_LEVEL = [name for name in ANSWERS if name in PRE_TOKENIZERS]


def read(path: Path) -> Tokenizer:
    return tokenizer_of(GGUFFile.open([path]).metadata)


def small(name: str, tmp_path: Path) -> Tokenizer:
    path = tmp_path / "v.gguf"
    if name == "spm":
        return read(write_vocabulary(path, Vocabulary.read("spm"), pre="default"))
    if name == "spm-no-prefix":
        flags = {"add_space_prefix": False, "add_bos_token": False}
        return read(write_vocabulary(path, Vocabulary.read("spm"), pre="default", **flags))
    if name == "gemma4":
        vocabulary = Vocabulary.read("spm").with_merges("gemma4")
        return read(write_vocabulary(path, vocabulary, pre="gemma4"))
    return read(write_vocabulary(path, Vocabulary.read("uncut"), pre=name))


def check(
    tokenizer: Tokenizer,
    answer: dict[str, Any],
    skipped: Callable[[str], bool] = lambda text: False,
) -> None:
    """Compare a tokenizer with llama.cpp's recorded results."""
    assert len(answer["ids"]) == len(TEXTS)
    for at, text in enumerate(TEXTS):
        if skipped(text):
            continue
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == answer["ids"][at], text
        plain = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        assert plain == answer["plain"].get(str(at), answer["ids"][at]), text
    assert tokenizer.encode(TEXTS[-1]) == answer["prompt"]
    assert sorted(tokenizer.eos_token_ids) == answer["ends"]
    pieces = map(tokenizer.token_bytes, range(tokenizer.vocab_size))
    assert sum((at + 1) * sum(piece) for at, piece in enumerate(pieces)) == answer["pieces"]


@pytest.mark.parametrize("name", [*BYTE_LEVEL, "spm", "spm-no-prefix", "gemma4"])
def test_ids_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    # llama.cpp's patterns for these two split words at marks; the models' own patterns do not.
    cased = name in ("tekken", "gpt-4o")
    check(small(name, tmp_path), ANSWERS[name], has_marks if cased else lambda text: False)


def has_marks(text: str) -> bool:
    return any(unicodedata.category(character).startswith("M") for character in text)


@pytest.mark.parametrize("name", ["tekken", "gpt-4o"])
def test_words_keep_their_marks(name: str) -> None:
    (pattern,) = PRE_TOKENIZERS[name].patterns
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    text = "הַשּׁוּעָל HTTPServer हिन्दी camelCase"
    words = [word for word, _ in split.pre_tokenize_str(text)]
    assert words == ["הַשּׁוּעָל", " HTTPServer", " हिन्दी", " camel", "Case"]


def test_pre_tokenizers_differ() -> None:
    """The corpus distinguishes all pre-tokenisers, except those that share their patterns."""
    alike: dict[str, list[str]] = {}
    for name in set(BYTE_LEVEL) - {"falcon"}:  # equal to default's except for a backtick
        alike.setdefault(json.dumps(ANSWERS[name]["ids"]), []).append(name)
    for names in alike.values():
        assert len({PRE_TOKENIZERS[name].patterns for name in names}) == 1, names


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "spm", "spm-no-prefix", "gemma4"])
@pytest.mark.parametrize("parse_special", [True, False])
def test_text_comes_back(name: str, parse_special: bool, tmp_path: Path) -> None:
    tokenizer = small(name, tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False, parse_special=parse_special)
        joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
        if "▁" in text and name.startswith(("spm", "gemma")):  # is a space there
            continue
        if name == "spm" and "<" in text:  # a space follows every special token
            continue
        assert joined == (" " + text if name == "spm" and text else text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_are_skipped_or_shown(tmp_path: Path) -> None:
    tokenizer = small("gpt-2", tmp_path)
    ids = tokenizer.encode("a<|im_end|>b<tool>")
    assert tokenizer.decode(ids) == "ab<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|im_end|>b<tool>"
    assert tokenizer.token_id("<|im_end|>") in tokenizer.special_token_ids
    assert tokenizer.token_text(tokenizer.token_id("<|im_end|>") or 0) == "<|im_end|>"


def test_ids_without_a_token_have_no_text(tmp_path: Path) -> None:
    tokenizer = small("gpt-2", tmp_path)
    for token_id in (-1, tokenizer.vocab_size, 10**6):
        assert tokenizer.token_bytes(token_id) == b""
        assert tokenizer.token_text(token_id) == ""
    assert tokenizer.token_id("no such token") is None


def test_half_characters_are_bytes_first(tmp_path: Path) -> None:
    tokenizer = small("gpt-2", tmp_path)
    ids = tokenizer.encode("🛸", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == "🛸"
    assert tokenizer.decode(ids[:1]) == "\ufffd"


def test_surrogates_become_text(tmp_path: Path) -> None:
    tokenizer = small("gpt-2", tmp_path)
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_bos_and_eos_are_added_where_the_file_says_so(tmp_path: Path) -> None:
    vocabulary = Vocabulary.read("bpe")
    bos, eos = vocabulary.id("<|im_start|>"), vocabulary.id("<|im_end|>")
    path = tmp_path / "v.gguf"
    both = read(write_vocabulary(path, vocabulary, add_bos_token=True, add_eos_token=True))
    assert [both.encode("")[at] for at in (0, -1)] == [bos, eos]
    assert both.encode("", add_special_tokens=False) == []
    assert both.bos == bos
    none = read(write_vocabulary(path, vocabulary, pre="llama-bpe", add_bos_token=False))
    assert none.encode("") == []


@pytest.mark.parametrize(("kind", "ends"), [(NORMAL, False), (CONTROL, True)])
def test_what_looks_like_an_end_may_be_text(kind: int, ends: bool, tmp_path: Path) -> None:
    """Qwen's vocabulary has HTML's </s> as plain text."""
    fields = golden("bpe")
    vocabulary = Vocabulary(
        **fields | {"tokens": [*fields["tokens"], "</s>"], "types": [*fields["types"], kind]}
    )
    tokenizer = read(write_vocabulary(tmp_path / "v.gguf", vocabulary))
    end = vocabulary.id("</s>")
    assert (end in tokenizer.eos_token_ids) is ends
    assert (end in tokenizer.encode("a</s>b")) is ends


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "no-such-pre"}, "pre-tokeniser 'no-such-pre' is not known"),
        ({"model": "t5"}, "tokenizer 't5' is not supported"),
        ({"tokens": ["a", "a"], "types": [1, 1]}, "the vocabulary contains a token twice"),
        ({"types": [1]}, "435 tokens have 1 types"),
        ({"merges": ["nospace"]}, "'nospace' does not have two parts"),
    ],
)
def test_bad_vocabularies(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    fields = golden("bpe") | {k: v for k, v in changes.items() if k != "pre"}
    vocabulary = Vocabulary(**fields)
    vocabulary.tokens.extend(["<|im_start|>", "<|im_end|>"] if len(vocabulary.tokens) == 2 else [])
    vocabulary.types.extend([3, 3] if len(vocabulary.types) == 2 else [])
    path = write_vocabulary(tmp_path / "v.gguf", vocabulary, pre=changes.get("pre", "gpt-2"))
    with pytest.raises(ModelLoadError, match=message):
        read(path)


def test_a_library_that_gives_up_is_a_model_error(tmp_path: Path) -> None:
    fields = golden("bpe")
    fields["tokens"][1] = "<|im:start|>"  # the library's templates cannot contain it
    vocabulary = Vocabulary(**fields)
    path = tmp_path / "v.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    vocabulary.add_to(writer, pre="llama-bpe")
    writer.add_bos_token_id(1)
    finish(writer)
    with pytest.raises(ModelLoadError, match="cannot make a tokenizer from its vocabulary"):
        read(path)


# tokenizer.json


def write_json(directory: Path, name: str, **settings: Any) -> ModelFiles:
    """Save a vocabulary as tokenizer.json, with tokenizer_config.json."""
    backend = small(name, directory)._backend
    (directory / "tokenizer.json").write_text(backend.to_str())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    names = {path.name: path for path in directory.glob("*.json")}
    return ModelFiles(weights=(), format="safetensors", names=names)


@pytest.mark.parametrize("name", ["qwen2", "spm"])
def test_tokenizer_json_gives_the_same_ids_and_bytes(name: str, tmp_path: Path) -> None:
    end = "</s>" if name == "spm" else "<|im_end|>"
    files = write_json(tmp_path, name, eos_token=end)
    tokenizer = json_tokenizer.tokenizer_of(files, {"eos_token_id": ANSWERS[name]["ends"]})
    check(tokenizer, ANSWERS[name])


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {}, {2}),
        ({"eos_token_id": 7}, {"eos_token_id": 9}, {2, 7}),
        ({"eos_token_id": [7, 8]}, {}, {2, 7, 8}),
        ({}, {"eos_token_id": 9}, {2, 9}),
        ({}, {"text_config": {"eos_token_id": [9]}}, {2, 9}),
    ],
)
def test_ends_of_text_come_from_the_configs(
    generation: Any, config: Any, expected: set[int], tmp_path: Path
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    files = write_json(tmp_path, "gpt-2", eos_token={"content": "<|im_end|>", "special": True})
    assert json_tokenizer.tokenizer_of(files, config).eos_token_ids == expected


def test_tokenizer_json_is_needed(tmp_path: Path) -> None:
    files = ModelFiles(weights=(), format="safetensors")
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.json") as caught:
        json_tokenizer.tokenizer_of(files, {})
    assert "save_pretrained" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["", "{}", '{"model": {"type": "Nothing"}}', "[1"])
def test_broken_tokenizer_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    files = ModelFiles((), "safetensors", {"tokenizer.json": tmp_path / "tokenizer.json"})
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        json_tokenizer.tokenizer_of(files, {})


def test_other_decoders_give_text_too(tmp_path: Path) -> None:
    model = tokenizers.models.WordPiece({"[UNK]": 0, "hel": 1, "##lo": 2}, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.decoder = tokenizers.decoders.WordPiece()
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    files = ModelFiles((), "safetensors", {"tokenizer.json": tmp_path / "tokenizer.json"})
    assert json_tokenizer.tokenizer_of(files, {}).token_bytes(1) == b"hel"


def test_a_vocabulary_of_too_many_merges(tmp_path: Path) -> None:
    """A few megabytes of tokens, each from a thousand pairs, would make gigabytes of merges."""
    tokens = ["a" * length for length in range(1, 600)]
    many = Vocabulary("llama", tokens, [1] * len(tokens), scores=[0.0] * len(tokens))
    path = write_vocabulary(tmp_path / "many.gguf", with_ends(many))
    with pytest.raises(ModelLoadError, match=r"has more than \d+ merges, of \d+ characters"):
        read(path)
    tokens = [f"{number:04}" + "ab" * 2000 for number in range(40)]
    long = Vocabulary("llama", tokens, [1] * len(tokens), scores=[0.0] * len(tokens))
    with pytest.raises(ModelLoadError, match="too long to merge by score"):
        read(write_vocabulary(tmp_path / "long.gguf", with_ends(long)))


def with_ends(vocabulary: Vocabulary) -> Vocabulary:
    """Return the vocabulary with tokens that begin and end a text."""
    assert vocabulary.scores is not None
    return Vocabulary(
        vocabulary.model,
        ["<s>", "</s>", *vocabulary.tokens],
        [3, 3, *vocabulary.types],
        scores=[0.0, 0.0, *vocabulary.scores],
    )


@pytest.mark.parametrize("first", ["$A $A $A $A", "$A", "$0"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_token_is_no_part_of_the_template(kind: str, first: str, tmp_path: Path) -> None:
    """A first token that templates would read as the text is rejected, so no text is repeated."""
    tokens = [first, "[SEP]", "[UNK]", "\u2581a"]
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", kind)
    Vocabulary(kind, tokens, [3, 3, 2, 1], scores=[0.0] * 4).add_to(writer, pre=None)
    writer.add_uint32("tokenizer.ggml.cls_token_id", 0)
    writer.add_uint32("tokenizer.ggml.bos_token_id", 0)
    finish(writer)
    with pytest.raises(ModelLoadError, match="cannot begin or end a text"):
        read(tmp_path / "v.gguf")
