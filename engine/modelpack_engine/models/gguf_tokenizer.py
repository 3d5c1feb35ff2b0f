"""Tokenizers from GGUF metadata: vocabulary, merges and pre-tokenizer patterns.

Each pre-tokenizer name stands for a sequence of split patterns. The names, and which of them share
patterns, are llama.cpp's (src/llama-vocab.cpp); where llama.cpp simplifies the pattern of a model's
tokenizer.json, that pattern is used instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from modelpack.errors import ModelpackError
from modelpack_engine.errors import as_error
from modelpack_engine.models.chat_template import ChatTemplate
from modelpack_engine.models.gguf_file import Metadata
from modelpack_engine.models.tokenizer import Tokenizer, TokenText

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(digits: str, letters: str = r"\p{L}", others: str = r"\p{L}\p{N}") -> str:
    """Return the pattern of Llama 3, or a variant of it."""
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}"
        rf"| ?[^\s{others}]+[\r\n]*|{_SPACES}"
    )


# Words by case, as in OpenAI's o200k: upper letters, then lower ones.
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _cased(digits: str, suffix: str, *, without: str = "", ends: str = r"[\r\n/]*") -> str:
    """Return the pattern of o200k, or a variant of it; `without` is an intersection of classes."""
    lead, upper, lower = r"[^\r\n\p{L}\p{N}]?", f"[{_UPPER}{without}]", f"[{_LOWER}{without}]"
    return (
        rf"{lead}{upper}*{lower}+{suffix}|{lead}{upper}+{lower}*{suffix}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+{ends}|{_SPACES}"
    )


def _thousands(digit: str) -> tuple[str, str]:
    """Return patterns that split a run of digits, alone in its word, into threes from its end.

    The time is linear in its length. A pattern that looks ahead at each group reads the rest of
    the run once a group.
    """
    return rf"\A{digit}{{1,2}}(?=(?:{digit}{{3}})++\z)", rf"{digit}{{3}}"


_LLAMA3 = _words(r"\p{N}{1,3}")
_QWEN2 = _words(r"\p{N}")
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
# Letters of scripts with two cases, as in the tokenizer.json of DeepSeek LLM; escaped, since
# editors normalise some of them.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# Runs of one script without spaces: Han and kana, Thai, Lao, Khmer, Burmese, Hangul.
_SCRIPTS = (
    "[\u4e00-\u9fff\u3040-\u30ff\u3400-\u4dbf\uf900-\ufaff\uff65-\uff9f\u2f00-\u2fdf]+"
    "|[\u0e00-\u0e7f]+|[\u0e80-\u0eff]+|[\u1780-\u17ff]+"
    "|[\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff]+|[\uac00-\ud7af\u1100-\u11ff]+"
)
# Hangul, punctuation of full width, bopomofo, Han and kana.
_WIDE = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u30ff]+"
    "|[\u2014\u2018\u2019\u201c\u201d\u2026\u3001-\u303f\ufe30-\ufe4f\uff01\uff0c\uff1a\uff1b]+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """Split patterns in order. With `whole_words`, a word that is a token needs no merges.

    With `add_bos`, prompts start with the beginning-of-sequence token unless the file says
    otherwise.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


_DIGITS_FIRST = PreTokenizer((r"\p{N}", _GPT2))
_PLAIN = PreTokenizer((_GPT2,))
_LLAMA3_LIKE = PreTokenizer((_LLAMA3,), whole_words=True, add_bos=True)
_QWEN2_LIKE = PreTokenizer((_QWEN2,))
_DEEPSEEK3 = PreTokenizer((r"\p{N}{1,3}", _CJK, _DEEPSEEK3_WORDS))
_SEED = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
)
_O200K_WORDS = _cased(r"\p{N}{1,3}", rf"{_CONTRACTIONS}?")
_O200K = PreTokenizer((_O200K_WORDS,))
# Spaces between letters are a part of the word.
_PHRASES = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|{_SPACES}"
)
_KIMI = r"\p{Han}+|" + _cased(
    r"\p{N}{1,3}", rf"{_CONTRACTIONS}?", without=r"&&[^\p{Han}]", ends=r"[\r\n]*"
)

_NAMES: Mapping[PreTokenizer, tuple[str, ...]] = {
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")): ("default", ""),
    _PLAIN: (
        *("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "mpt", "olmo", "jais"),
        *("trillion", "granite-docling", "roberta-bpe"),
    ),
    _DIGITS_FIRST: (
        *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    ),
    _LLAMA3_LIKE: (
        *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"),
        *("midm-2.0",),
    ),
    PreTokenizer((_LLAMA3,)): ("dbrx", "smaug-bpe", "chatglm-bpe"),
    PreTokenizer((_LLAMA3,), whole_words=True): ("glm4",),
    _QWEN2_LIKE: (
        *("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "solar-open"),
        *("kormo", "f2llmv2"),
        *("bailingmoe", "bailingmoe2", "llada-moe"),  # differ in writing only: \s*[\r\n]
    ),
    PreTokenizer((_words(r"\p{N}", r"[\p{L}\p{M}]", r"\p{L}\p{M}\p{N}"),)): ("qwen35",),
    # Without contractions: Turkish words have suffixes after apostrophes.
    PreTokenizer((_QWEN2.removeprefix(f"{_CONTRACTIONS}|"),)): ("ufakzeka",),
    PreTokenizer((r"\p{N}{1,3}", _words(r"\p{N}+")), whole_words=True): ("minicpm5",),
    _DEEPSEEK3: ("deepseek-v3", "hunyuan-dense", "joyai-llm"),
    PreTokenizer((r"\p{Nd}+", *_thousands(r"\p{Nd}"), _SCRIPTS, _DEEPSEEK3_WORDS)): ("afmoe",),
    PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_CASED_LETTERS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _ASIAN,
            r"\p{N}+",
        )
    ): ("deepseek-llm",),
    PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, r"\p{N}")): ("deepseek-coder",),
    PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")): ("falcon",),
    PreTokenizer((_cased(r"\p{N}", ""),), whole_words=True, add_bos=True): ("tekken",),
    PreTokenizer((_SEED,)): ("seed-coder",),
    _O200K: ("gpt-4o", "llama4", "kanana2", "minimax-m2"),
    # The words split digits before a letter, from their start.
    PreTokenizer((r"(?<!\d)\d++\b", _thousands(r"\d")[0], _O200K_WORDS)): ("tiny_aya",),
    PreTokenizer((_WIDE, _cased(r"\p{N}", rf"{_CONTRACTIONS}?")), whole_words=True): ("youtu",),
    PreTokenizer((_KIMI,)): ("kimi-k2",),
    PreTokenizer((_PHRASES,)): ("exaone-moe",),
    # BLOOM's words.
    PreTokenizer((" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+", r"\p{N}")): (
        "viking",
    ),
}

#: Pre-tokenisers by the value of `tokenizer.ggml.pre`; "" is for files without that value.
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    name: pre_tokenizer for pre_tokenizer, names in _NAMES.items() for name in names
}


_KEY = "tokenizer.ggml."


def wordpiece_of(metadata: Metadata, tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    """Return the tokenizer of a vocabulary whose tokenizer.ggml.model is `bert`.

    Raises `ModelLoadError` if it lacks the tokens that begin and end a text.
    """
    pieces = [_piece(token, kind) for token, kind in zip(tokens, types, strict=False)]
    ids = {piece: at for at, piece in enumerate(pieces)}
    if len(ids) != len(pieces):
        raise metadata.error("the vocabulary contains a token twice")
    first = _named(metadata, pieces, ("cls_token_id", "bos_token_id"), "[CLS]")
    # The key is misspelt in llama.cpp, and so in every file.
    last = _named(metadata, pieces, ("seperator_token_id", "eos_token_id"), "[SEP]")
    unknown = _named(metadata, pieces, ("unknown_token_id",), "[UNK]")
    check_surrounding(metadata, first, last)
    backend = tokenizers.Tokenizer(models.WordPiece(ids, unk_token=unknown))
    # Files do not say whether a model is cased; a vocabulary without upper-case letters is not.
    lowered = not any(
        piece != piece.lower()
        for piece, kind in zip(pieces, types, strict=False)
        if kind not in (_UNKNOWN, _CONTROL) and not piece.startswith("[")
    )
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowered)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = [
        piece for piece, kind in zip(pieces, types, strict=False) if kind in (_UNKNOWN, _CONTROL)
    ]
    backend.add_special_tokens([*dict.fromkeys((*special, first, last, unknown))])
    backend.post_processor = processors.TemplateProcessing(
        # Lists, because a string is split at the spaces that a token may contain.
        single=[first, "$A", last],
        pair=[first, "$A", last, "$B:1", f"{last}:1"],
        special_tokens=[(first, ids[first]), (last, ids[last])],
    )
    return Tokenizer(
        backend,
        text=TokenText.OTHER,
        eos_token_ids=[ids[last]],
        bos=ids[first],
        special_tokens={"cls_token": first, "sep_token": last, "unk_token": unknown},
    )


def check_surrounding(metadata: Metadata, *tokens: str) -> None:
    """Raise `ModelLoadError` for a token that a template would read as the text (`$A`)."""
    for token in tokens:
        if token.startswith("$"):
            raise metadata.error(
                f"the token {token[:40]!r} cannot begin or end a text, because it begins with $"
            )


def _piece(token: str, kind: int) -> str:
    """Return a token as BERT's own vocabulary writes it."""
    if token.startswith("▁"):
        return token[1:]
    bracketed = len(token) > 2 and token.startswith("[") and token.endswith("]")
    if kind in (_UNKNOWN, _CONTROL) or bracketed:
        return token
    return f"##{token}"


def _named(metadata: Metadata, pieces: Sequence[str], keys: Sequence[str], usual: str) -> str:
    """Return the piece that the first of `keys` names, or the usual one."""
    for key in keys:
        if f"{_KEY}{key}" in metadata:
            at = metadata.integer(f"{_KEY}{key}")
            if 0 <= at < len(pieces):
                return pieces[at]
    if usual not in pieces:
        raise metadata.error(f"the vocabulary has no {usual}, and {keys[0]} names no token")
    return usual


# The pre-tokeniser of files whose tokens are SentencePiece's, with merges instead of scores.
_SARVAM = "sarvam-moe"
# The only one of a model that reads pairs of texts, with a separator between them.
_ROBERTA = "roberta-bpe"
_TEMPLATE = "tokenizer.chat_template"

# The most characters of a token; known vocabularies have up to 512.
_MAX_TOKEN = 4096
# The most characters of all merges of a vocabulary with scores, and of the texts that are looked up
# for them. The largest known vocabulary has 5 million in 600,000 merges.
_MAX_MERGED = 32 * 1024 * 1024
_MAX_SPLIT = 512 * 1024 * 1024

# Token types of llama.cpp.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # 6 is a byte

# Tokens that end a text even if the metadata do not name them, as in llama.cpp; the last two rows
# are padding, the next repository and the next file of fill-in-the-middle.
_ENDS = frozenset(
    {"<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"}
    | {"<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_utterance>"}
    | {"<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>"}
    | {"<|fim_pad|>", "<fim-pad>", "<fim_pad>"}
    | {"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<|file_sep|>"}
)
# Tokens that may also be plain text: Qwen's vocabulary has HTML's </s>. They end a text only if the
# file marks them as special; llama.cpp always does.
_ENDS_IF_SPECIAL = frozenset(
    {"</s>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "[e~[", "<PAD>", "[PAD]", "<REPO>"}
    | {"<reponame>"}
)
# With these two tokens (Harmony), <|end|> ends a message, not the response.
_HARMONY = ("<|return|>", "<|call|>")
# Special tokens of Phi-3 strip the spaces after them, except these.
_PHI3_KEEPS_SPACES = frozenset({"<unk>", "<s>", "<|endoftext|>"})


@dataclass(frozen=True)
class _Vocabulary:
    tokens: list[str]
    types: list[int]
    scores: list[float]

    @cached_property
    def ids(self) -> dict[str, int]:
        return {token: at for at, token in enumerate(self.tokens)}


def tokenizer_of(metadata: Metadata, chat_template: str | None = None) -> Tokenizer:
    """Return the tokenizer in `metadata`; `chat_template` replaces the file's own.

    Raises `ModelLoadError` for an unknown kind of tokenizer or pre-tokeniser, and for a vocabulary
    that `tokenizers` rejects.
    """
    try:
        return _tokenizer(metadata, chat_template)
    except ModelpackError:
        raise
    except BaseException as error:  # the library raises nothing more precise
        reason = str(as_error(error, "tokenizers"))[:500]
        raise metadata.error(f"cannot make a tokenizer from its vocabulary: {reason}") from error


def _tokenizer(metadata: Metadata, chat_template: str | None) -> Tokenizer:
    kind = metadata.text(f"{_KEY}model")
    vocabulary = _vocabulary(metadata)
    if kind == "bert":
        return wordpiece_of(metadata, vocabulary.tokens, vocabulary.types)
    pre = metadata.text(f"{_KEY}pre", "")
    if kind == "gpt2" and pre != _SARVAM:
        pre_tokenizer = _pre_tokenizer(metadata)
        backend = _byte_level(metadata, vocabulary, pre_tokenizer)
        text, add_bos, prefix = TokenText.BYTE_LEVEL, pre_tokenizer.add_bos, False
    elif kind == "llama":
        prefix = metadata.flag(f"{_KEY}add_space_prefix", True)
        merges = _merges_by_score(metadata, vocabulary)
        backend = _sentencepiece(metadata, vocabulary, merges, prefix)
        text, add_bos = TokenText.SENTENCEPIECE, True
    elif kind in ("gemma4", "gpt2"):
        backend = _sentencepiece(metadata, vocabulary, _merges(metadata, vocabulary), False)
        text, add_bos, prefix = TokenText.SENTENCEPIECE, kind == "gemma4", False
    else:
        raise metadata.error(
            f"the tokenizer {kind[:100]!r} is not supported, expected gpt2, llama, gemma4 or bert",
            hint="package the model's tokenizer.json beside the weights",
        )
    _add_special_tokens(backend, metadata, vocabulary)
    bos, eos = (_special_id(metadata, name, vocabulary) for name in ("bos", "eos"))
    if bos is None and kind == "llama":
        bos = 1
    if eos is None and kind == "llama":
        eos = 2
    named = {
        f"{name}_token": vocabulary.tokens[at]
        for name, at in (("bos", bos), ("eos", eos))
        if at is not None
    }
    before = named.get("bos_token") if metadata.flag(f"{_KEY}add_bos_token", add_bos) else None
    after = named.get("eos_token") if metadata.flag(f"{_KEY}add_eos_token", False) else None
    sep = _special_id(metadata, "seperator", vocabulary) if pre == _ROBERTA else None
    between = None if sep is None else vocabulary.tokens[sep]
    added = [token for token in (before, after, between) if token is not None]
    check_surrounding(metadata, *added)
    if added:
        ids = vocabulary.ids
        pair = (before, "$A", after, between, "$B", after)
        backend.post_processor = processors.TemplateProcessing(
            single=[token for token in (before, "$A", after) if token is not None],
            pair=[token for token in pair if token is not None],
            special_tokens=[(token, ids[token]) for token in dict.fromkeys(added)],
        )
    return Tokenizer(
        backend,
        text=text,
        eos_token_ids=_ends(metadata, vocabulary, eos),
        bos=bos,
        special_tokens=named,
        chat_template=_template(metadata, chat_template),
        strip_leading_space=prefix,
    )


def _vocabulary(metadata: Metadata) -> _Vocabulary:
    tokens = [
        raw.decode(errors="surrogateescape") or f"[EMPTY_{at}]"
        for at, raw in enumerate(metadata.strings(f"{_KEY}tokens"))
    ]
    if not _is_utf8("".join(tokens)):
        tokens = [
            token.encode(errors="surrogateescape").decode(errors="replace") for token in tokens
        ]
    longest = max(map(len, tokens), default=0)
    if longest > _MAX_TOKEN:  # every place where a token may be split is tried
        raise metadata.error(f"a token has {longest} characters, expected at most {_MAX_TOKEN}")
    if len(set(tokens)) != len(tokens):
        raise metadata.error("the vocabulary contains a token twice")
    types: Sequence[int] = [_NORMAL] * len(tokens)
    if f"{_KEY}token_type" in metadata:
        types = metadata.numbers(f"{_KEY}token_type").tolist()
    scores: Sequence[float] = [0.0] * len(tokens)
    if f"{_KEY}scores" in metadata:
        scores = metadata.numbers(f"{_KEY}scores").tolist()
    if len(types) < len(tokens) or len(scores) < len(tokens):
        raise metadata.error(
            f"{len(tokens)} tokens have {len(types)} types and {len(scores)} scores"
        )
    types = [
        _CONTROL if token in _ENDS else kind for token, kind in zip(tokens, types, strict=False)
    ]
    return _Vocabulary(tokens, types, list(scores))


def _is_utf8(text: str) -> bool:
    """Return whether a text has no bytes that were not UTF-8, which surrogates stand for."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _pre_tokenizer(metadata: Metadata) -> PreTokenizer:
    name = metadata.text(f"{_KEY}pre", "")
    found = PRE_TOKENIZERS.get(name)
    if found is None:
        raise metadata.error(
            f"the pre-tokeniser {name[:100]!r} is not known",
            hint="package the model's tokenizer.json beside the weights",
        )
    return found


def _merges(metadata: Metadata, vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Return the merges of the file whose parts and result are tokens."""
    known = vocabulary.ids
    merges: list[tuple[str, str]] = []
    for raw in metadata.strings(f"{_KEY}merges"):
        merge = raw.decode(errors="replace")
        at = merge.find(" ", 1)  # the first part may start with a space, never the second
        if at < 0:
            raise metadata.error(f"the merge {merge[:100]!r} does not have two parts")
        left, right = merge[:at], merge[at + 1 :]
        if left in known and right in known and left + right in known:
            merges.append((left, right))
    return merges


def _byte_level(
    metadata: Metadata, vocabulary: _Vocabulary, pre_tokenizer: PreTokenizer
) -> tokenizers.Tokenizer:
    merges = _merges(metadata, vocabulary)
    model = models.BPE(vocabulary.ids, merges, ignore_merges=pre_tokenizer.whole_words)
    backend = tokenizers.Tokenizer(model)
    patterns = map(tokenizers.Regex, pre_tokenizer.patterns)
    splits = [pre_tokenizers.Split(pattern, "isolated") for pattern in patterns]
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_only])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    metadata: Metadata, vocabulary: _Vocabulary, merges: list[tuple[str, str]], prefix: bool
) -> tokenizers.Tokenizer:
    unknown = _special_id(metadata, "unknown", vocabulary)
    model = models.BPE(
        vocabulary.ids,
        merges,
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        byte_fallback=True,
        fuse_unk=False,
    )
    backend = tokenizers.Tokenizer(model)
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    if prefix:
        steps.insert(0, normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def _merges_by_score(metadata: Metadata, vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Return every pair of tokens that joins to a token, the best score first.

    SentencePiece joins the neighbours whose joint text has the best score. Among equals it joins
    the leftmost, which the order of merges need not express: equals have the same text. Raises
    `ModelLoadError` for a vocabulary with far more merges than any known one.
    """
    mergeable = (_NORMAL, _USER_DEFINED, _UNUSED)
    rows = zip(vocabulary.tokens, vocabulary.types, vocabulary.scores, strict=False)
    scores = {token: score for token, kind, score in rows if kind in mergeable}
    if sum(len(token) ** 2 for token in scores) > _MAX_SPLIT:
        raise metadata.error("the tokens of its vocabulary are too long to merge by score")
    merges = []
    characters = 0
    for order, (token, score) in enumerate(scores.items()):
        for at in range(1, len(token)):
            if token[:at] in scores and token[at:] in scores:
                merges.append((-score, order, token[:at], token[at:]))
                characters += len(token)
        if characters > _MAX_MERGED:
            raise metadata.error(
                f"its vocabulary has more than {len(merges)} merges, of {characters} characters"
            )
    merges.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in merges]


def _add_special_tokens(
    backend: tokenizers.Tokenizer, metadata: Metadata, vocabulary: _Vocabulary
) -> None:
    name = metadata.text("general.name", "").lower()
    strips = "phi-3" in name or "phi3" in name
    special: list[AddedToken] = []
    defined: list[AddedToken] = []
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind not in (_CONTROL, _UNKNOWN, _USER_DEFINED):
            continue
        added = AddedToken(
            token,
            normalized=False,
            special=kind != _USER_DEFINED,
            rstrip=strips and token not in _PHI3_KEEPS_SPACES,
        )
        (defined if kind == _USER_DEFINED else special).append(added)
    backend.add_special_tokens(special)
    backend.add_tokens(defined)


def _special_id(metadata: Metadata, name: str, vocabulary: _Vocabulary) -> int | None:
    """Return the id that the metadata give for `name`; an id beyond the vocabulary is ignored."""
    key = f"{_KEY}{name}_token_id"
    if key not in metadata:
        return None
    found = metadata.integer(key)
    return found if 0 <= found < len(vocabulary.tokens) else None


def _ends(metadata: Metadata, vocabulary: _Vocabulary, eos: int | None) -> frozenset[int]:
    others = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")
    named = (eos, *(_special_id(metadata, name, vocabulary) for name in others))
    found = {at for at in named if at is not None}
    ids = vocabulary.ids
    found |= {ids[token] for token in _ENDS if token in ids}
    special = (ids[token] for token in _ENDS_IF_SPECIAL if token in ids)
    found |= {at for at in special if vocabulary.types[at] == _CONTROL}
    if all(token in ids for token in _HARMONY):
        found.discard(ids.get("<|end|>", -1))
    return frozenset(found)


def _template(metadata: Metadata, chosen: str | None) -> ChatTemplate | None:
    if chosen is not None:
        return ChatTemplate(chosen)
    if _TEMPLATE not in metadata:
        return None
    tool_use = metadata.text(f"{_TEMPLATE}.tool_use", "") or None
    return ChatTemplate(metadata.text(_TEMPLATE), tool_use=tool_use)
