"""Token ids equal llama.cpp's for every kind of pre-tokeniser, on a corpus chosen to differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.models import ModelFiles, Tokenizer, json_tokenizer
from modelpack_engine.models.gguf_architectures import ARCHITECTURES, VARIANTS, WITH_AXES
from modelpack_engine.models.gguf_file import GGUFFile
from modelpack_engine.models.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_of
from tests.engine.embedding.gguf_models import add_roberta
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
_OTHER_KINDS = ("spm", "spm-no-prefix", "gemma4", "sarvam-moe", "smollm2")
BYTE_LEVEL = [name for name in ANSWERS if name not in _OTHER_KINDS]
# llama.cpp simplifies the patterns of some models; ours are the models' own. The texts where that
# shows, by their first words: marks of letters, words by case, letters or spaces beside digits,
# scripts beside each other.
_MARKS, _CASES, _DIGITS, _SPACES = "Быстрая", "ALLCAPS", "Hello, y'all", "1  12"
_SCRIPTS = "हिन्दी"
SIMPLIFIED: Mapping[str, tuple[str, ...]] = {
    "tekken": (_MARKS,),
    "gpt-4o": (_MARKS,),
    "minimax-m2": (_MARKS,),
    "kimi-k2": (_MARKS, _CASES),
    "youtu": (_CASES,),
    "tiny_aya": (_CASES, _DIGITS, _SPACES),
    "afmoe": (_SCRIPTS, _SPACES),
}


def read(path: Path) -> Tokenizer:
    return tokenizer_of(GGUFFile.open([path]).metadata)


def small(name: str, tmp_path: Path) -> Tokenizer:
    path = tmp_path / "v.gguf"
    if name == "spm":
        return read(write_vocabulary(path, Vocabulary.read("spm"), pre="default"))
    if name == "spm-no-prefix":
        flags = {"add_space_prefix": False, "add_bos_token": False}
        return read(write_vocabulary(path, Vocabulary.read("spm"), pre="default", **flags))
    if name in ("gemma4", "sarvam-moe"):
        vocabulary = Vocabulary.read("spm").with_merges("gemma4" if name == "gemma4" else "gpt2")
        return read(write_vocabulary(path, vocabulary, pre=name))
    return read(write_vocabulary(path, Vocabulary.read("uncut"), pre=name))


def check(tokenizer: Tokenizer, answer: dict[str, Any], simplified: tuple[str, ...] = ()) -> None:
    """Compare a tokenizer with llama.cpp's recorded results; they differ in `simplified` texts."""
    assert len(answer["ids"]) == len(TEXTS)
    for at, text in enumerate(TEXTS):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert (ids == answer["ids"][at]) != text.startswith(simplified), text
        if not text.startswith(simplified):
            plain = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
            assert plain == answer["plain"].get(str(at), answer["ids"][at]), text
    assert tokenizer.encode(TEXTS[-1]) == answer["prompt"]
    assert sorted(tokenizer.eos_token_ids) == answer["ends"]
    pieces = map(tokenizer.token_bytes, range(tokenizer.vocab_size))
    assert sum((at + 1) * sum(piece) for at, piece in enumerate(pieces)) == answer["pieces"]


@pytest.mark.parametrize("name", [*BYTE_LEVEL, *_OTHER_KINDS[:-1]])
def test_ids_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    check(small(name, tmp_path), ANSWERS[name], SIMPLIFIED.get(name, ()))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        *(("afmoe", "deepseek-v3"), ("exaone-moe", "exaone4"), ("minimax-m2", "llama-bpe")),
        *(("kimi-k2", "gpt-4o"), ("youtu", "gpt-4o"), ("joyai-llm", "deepseek-llm")),
        *(("tiny_aya", "command-r"), ("midm-2.0", "gpt-2"), ("kormo", "llama-bpe")),
        *(("f2llmv2", "qwen35"), ("minicpm5", "llama-bpe"), ("ufakzeka", "qwen2")),
        *(("viking", "gpt-2"), ("roberta-bpe", "qwen2"), ("sarvam-moe", "gemma4")),
    ],
)
def test_another_pre_tokenizer_is_found(name: str, other: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check(small(other, tmp_path), ANSWERS[name], SIMPLIFIED.get(name, ()))


def words(patterns: tuple[str, ...], text: str) -> list[str]:
    """Return the words that patterns split a text into."""
    splits = [tokenizers.pre_tokenizers.Split(tokenizers.Regex(p), "isolated") for p in patterns]
    return [word for word, _ in tokenizers.pre_tokenizers.Sequence(splits).pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ("tekken", "gpt-4o", "minimax-m2"),
            ["הַשּׁוּעָל", " HTTPServer", " हिन्दी", " camel", "Case"],
        ),
        (
            ("kimi-k2",),
            ["東京", "の", "々", " हिन्दी", " ", "123", "4", " camel", "Case's", "/\n", "/"],
        ),
        (
            ("youtu",),
            ["東京の", "。", "한글", "ㄅㄆ", "x", " ", "1", "2", " camel", "Case's", "—", "/\n"],
        ),
        (
            ("tiny_aya",),
            ["1", "234", " ", " ", "123", "4", "km", " ", "56", "_", " camel", "Case's"],
        ),
        (
            ("afmoe",),
            ["ภาษา", "東京", "a", "ລາວ", "b", "한글", "c", "ខ្មែរ", "1", "234", "  ", "1", "½d"],
        ),
        (("viking",), ["Hei", ",", " Åbo", "1", "2", "।", "x", "۔", "y", "(", "z'", "…", " {"]),
    ],
)
def test_words_of_the_models_own_patterns(names: tuple[str, ...], expected: list[str]) -> None:
    for name in names:
        assert words(PRE_TOKENIZERS[name].patterns, "".join(expected)) == expected


_ALPHABET = st.text("0123456789 \n_aZ.½٣ก中", max_size=30)


@given(text=_ALPHABET)
@example("  0_")
def test_groups_of_digits(text: str) -> None:
    """Patterns that read digits twice split as those that look ahead at each group."""
    own = (r"\d{1,3}(?=(?:\d{3})*\b)", *PRE_TOKENIZERS["gpt-4o"].patterns)
    assert words(PRE_TOKENIZERS["tiny_aya"].patterns, text) == words(own, text)
    own = (r"\p{Nd}{1,3}(?=(?:\p{Nd}{3})*(?!\p{Nd}))", *PRE_TOKENIZERS["afmoe"].patterns[3:])
    assert words(PRE_TOKENIZERS["afmoe"].patterns, text) == words(own, text)


def test_pre_tokenizers_differ() -> None:
    """The corpus distinguishes all pre-tokenisers, except those that share their patterns."""
    names = set(BYTE_LEVEL) - {"falcon"}  # equal to default's except for a backtick
    for one, other in combinations(sorted(names), 2):
        own = SIMPLIFIED.get(one, ()) + SIMPLIFIED.get(other, ())
        differ = any(
            ANSWERS[one]["ids"][at] != ANSWERS[other]["ids"][at]
            for at, text in enumerate(TEXTS)
            if not text.startswith(own)
        )
        alike = PRE_TOKENIZERS[one].patterns == PRE_TOKENIZERS[other].patterns
        assert differ != alike, (one, other)


#: The pre-tokenisers of published files of each architecture; "" is another kind of tokenizer.
USUAL = {
    "afmoe": "afmoe",
    "apertus": "tekken",
    "bailingmoe2": "bailingmoe2 sarvam-moe",
    "chatglm": "chatglm-bpe",
    "cohere2": "command-r tiny_aya",
    "command-r": "command-r",
    "deci": "llama-bpe",
    "deepseek": "deepseek-llm",
    "deepseek2": "deepseek-llm deepseek-v3 gigachat glm4 joyai-llm kanana2 kimi-k2 youtu",
    "dots1": "qwen2",
    "ernie4_5": "",
    "ernie4_5-moe": "",
    "exaone": "exaone",
    "exaone-moe": "exaone-moe",
    "exaone4": "exaone4",
    "falcon-h1": "falcon-h1",
    "gemma": "",
    "gemma2": "",
    "gemma3": "",
    "gemma3n": "",
    "gemma4": "",
    "glm4": "glm4",
    "glm4moe": "glm4 solar-open",
    "gpt-oss": "gpt-4o",
    "gpt2": "gpt-2",
    "gptneox": "olmo",
    "granite": "refact",
    "granitehybrid": "dbrx",
    "granitemoe": "refact",
    "hunyuan-dense": "hunyuan-dense",
    "hunyuan-moe": "hunyuan",
    "internlm2": "",
    "jamba": "",
    "kimi-linear": "kimi-k2",
    "lfm2": "lfm2",
    "lfm2moe": "lfm2",
    "llama": "deepseek-coder deepseek-llm default falcon3 llama-bpe llama-v3 llama3 megrez midm-2.0"
    " minerva-7b minicpm5 pixtral seed-coder smaug-bpe smollm tekken trillion viking",
    "llama4": "llama4",
    "mamba": "falcon olmo",
    "mamba2": "olmo",
    "minicpm": "",
    "minimax-m2": "minimax-m2",
    "mistral3": "tekken",
    "mistral4": "tekken",
    "nemotron": "",
    "nemotron_h": "pixtral",
    "nemotron_h_moe": "pixtral",
    "olmo2": "dbrx",
    "olmoe": "olmo",
    "openelm": "",
    "phi2": "phi-2",
    "phi3": "dbrx gpt-4o",
    "qwen": "qwen2",
    "qwen2": "a.x-4.0 deepseek-r1-qwen kormo qwen2",
    "qwen2moe": "qwen2",
    "qwen2vl": "qwen2",
    "qwen3": "f2llmv2 qwen2 ufakzeka",
    "qwen35": "qwen35",
    "qwen35moe": "qwen35",
    "qwen3moe": "qwen2",
    "qwen3next": "qwen2",
    "qwen3vl": "qwen2",
    "qwen3vlmoe": "qwen2",
    "seed_oss": "seed-coder",
    "smollm3": "smaug-bpe",
    "stablelm": "gpt-2 stablelm2",
    "starcoder": "starcoder",
    "starcoder2": "starcoder",
}


def test_the_usual_pre_tokenizers_of_all_architectures_are_known() -> None:
    """docs/models.md says that files of these architectures run, so their text must be read."""
    variants = {name for name, *_ in VARIANTS}
    assert USUAL.keys() == ARCHITECTURES.keys() | variants | WITH_AXES.keys()
    for architecture, names in USUAL.items():
        assert set(names.split()) <= {*PRE_TOKENIZERS, "sarvam-moe"}, architecture


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


def test_pairs_are_those_of_roberta(tmp_path: Path) -> None:
    """Both texts have an end, and a separator is between them: <s>a</s></s>b</s>."""
    vocabulary = Vocabulary.read("bpe")
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "bert")
    add_roberta(writer, vocabulary)
    finish(writer)
    bos, eos, a, b = map(vocabulary.id, ("<|im_start|>", "<|im_end|>", "a", "b"))
    tokenizer = read(tmp_path / "v.gguf")
    assert tokenizer.encode("a") == [bos, a, eos]
    assert tokenizer.encode_typed("a", "b") == ([bos, a, eos, eos, b, eos], [0] * 6)


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
