"""The tokenizer in the metadata of a GGUF file.

Source: llama.cpp src/llama-vocab.cpp: which tokens are special, which end a text, what is put
before a prompt, and how SentencePiece vocabularies merge by score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from modelpack.errors import ModelpackError
from modelpack_engine.loaders.chat_template import ChatTemplate
from modelpack_engine.loaders.gguf_file import Metadata
from modelpack_engine.loaders.gguf_wordpiece import check_surrounding, wordpiece_of
from modelpack_engine.loaders.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from modelpack_engine.loaders.tokenizer import Tokenizer, TokenText
from modelpack_engine.panics import as_error

_KEY = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"

# Characters of a token; those of known vocabularies have up to 512.
_MAX_TOKEN = 4096
# Characters of all merges that a vocabulary with scores makes, and of what is looked up for them.
# The largest has 5 million in 600,000 merges.
_MAX_MERGED = 32 * 1024 * 1024
_MAX_SPLIT = 512 * 1024 * 1024

# Token types of llama.cpp.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # 6 is a byte

# Texts of tokens that end a text whatever the metadata say, as in llama.cpp; the last two rows are
# padding, the next repository and the next file of fill-in-the-middle.
_ENDS = frozenset(
    {"<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"}
    | {"<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_utterance>"}
    | {"<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>"}
    | {"<|fim_pad|>", "<fim-pad>", "<fim_pad>"}
    | {"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<|file_sep|>"}
)
# Those that may be plain text: Qwen's vocabulary has </s> as HTML has it. They count where the file
# says that they are special; llama.cpp makes them so.
_ENDS_IF_SPECIAL = frozenset(
    {"</s>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "[e~[", "<PAD>", "[PAD]", "<REPO>"}
    | {"<reponame>"}
)
# Harmony: <|end|> ends a message, not the answer, where these two exist.
_HARMONY = ("<|return|>", "<|call|>")
# Special tokens of Phi-3 swallow the spaces behind them; these do not.
_PHI3_KEEPS_SPACES = frozenset({"<unk>", "<s>", "<|endoftext|>"})


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    tokens: list[str]
    types: list[int]
    scores: list[float]

    def ids(self) -> dict[str, int]:
        return {token: at for at, token in enumerate(self.tokens)}


def tokenizer_of(metadata: Metadata, chat_template: str | None = None) -> Tokenizer:
    """Return the tokenizer in `metadata`; `chat_template` is taken instead of the file's own.

    Raises `ModelLoadError` for a kind of tokenizer or a pre-tokeniser that is not known, and for
    a vocabulary that makes no tokenizer.
    """
    try:
        return _tokenizer(metadata, chat_template)
    except ModelpackError:
        raise
    except BaseException as error:  # the library raises nothing more precise
        reason = str(as_error(error, "tokenizers"))[:500]
        raise metadata.error(f"its vocabulary makes no tokenizer: {reason}") from error


def _tokenizer(metadata: Metadata, chat_template: str | None) -> Tokenizer:
    kind = metadata.text(f"{_KEY}model")
    vocabulary = _vocabulary(metadata)
    if kind == "bert":
        return wordpiece_of(metadata, vocabulary.tokens, vocabulary.types)
    if kind == "gpt2":
        pre_tokenizer = _pre_tokenizer(metadata)
        backend = _byte_level(metadata, vocabulary, pre_tokenizer)
        text, add_bos, prefix = TokenText.BYTE_LEVEL, pre_tokenizer.add_bos, False
    elif kind == "llama":
        prefix = metadata.flag(f"{_KEY}add_space_prefix", True)
        backend = _sentencepiece(metadata, vocabulary, prefix)
        text, add_bos = TokenText.SENTENCEPIECE, True
    else:
        raise metadata.error(
            f"the tokenizer {kind[:100]!r} is not supported, expected gpt2, llama or bert",
            hint="package the model's tokenizer.json beside the weights",
        )
    _add_special_tokens(backend, metadata, vocabulary)
    bos, eos = (_special_id(metadata, name, vocabulary) for name in ("bos", "eos"))
    if bos is None and kind == "llama":
        bos = 1
    if eos is None and kind == "llama":
        eos = 2
    _add_surroundings(
        backend,
        metadata,
        vocabulary,
        bos if metadata.flag(f"{_KEY}add_bos_token", add_bos) else None,
        eos if metadata.flag(f"{_KEY}add_eos_token", False) else None,
    )
    named = {
        f"{name}_token": vocabulary.tokens[at]
        for name, at in (("bos", bos), ("eos", eos))
        if at is not None
    }
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
    if any("\udc80" <= character <= "\udcff" for token in tokens for character in token):
        tokens = [
            token.encode(errors="surrogateescape").decode(errors="replace") for token in tokens
        ]
    longest = max(map(len, tokens), default=0)
    if longest > _MAX_TOKEN:  # all places where it may be cut are tried
        raise metadata.error(f"a token has {longest} characters, expected at most {_MAX_TOKEN}")
    if len(set(tokens)) != len(tokens):
        raise metadata.error("the vocabulary holds a token twice")
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


def _pre_tokenizer(metadata: Metadata) -> PreTokenizer:
    name = metadata.text(f"{_KEY}pre", "")
    found = PRE_TOKENIZERS.get(name)
    if found is None:
        raise metadata.error(
            f"the pre-tokeniser {name[:100]!r} is not known",
            hint="package the model's tokenizer.json beside the weights",
        )
    return found


def _byte_level(
    metadata: Metadata, vocabulary: _Vocabulary, pre_tokenizer: PreTokenizer
) -> tokenizers.Tokenizer:
    merges: list[tuple[str, str]] = []
    for raw in metadata.strings(f"{_KEY}merges"):
        merge = raw.decode(errors="replace")
        at = merge.find(" ", 1)  # the first part may start with a space, never the second
        if at < 0:
            raise metadata.error(f"the merge {merge[:100]!r} has no two parts")
        merges.append((merge[:at], merge[at + 1 :]))
    known = vocabulary.ids()
    merges = [
        (left, right)
        for left, right in merges
        if left in known and right in known and left + right in known
    ]
    model = models.BPE(known, merges, ignore_merges=pre_tokenizer.whole_words)
    backend = tokenizers.Tokenizer(model)
    splits = [
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        for pattern in pre_tokenizer.patterns
    ]
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_only])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    metadata: Metadata, vocabulary: _Vocabulary, prefix: bool
) -> tokenizers.Tokenizer:
    unknown = _special_id(metadata, "unknown", vocabulary)
    model = models.BPE(
        vocabulary.ids(),
        _merges_by_score(metadata, vocabulary),
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
    """Return every pair of tokens that makes a token, the best score first.

    SentencePiece joins the neighbours whose joint text has the best score; among equals the left
    ones, which the order of merges cannot say and does not need to: they have the same text.
    Raises `ModelLoadError` for a vocabulary with far more of them than any that is known.
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
                f"its vocabulary makes more than {len(merges)} merges, of {characters} characters"
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


def _add_surroundings(
    backend: tokenizers.Tokenizer,
    metadata: Metadata,
    vocabulary: _Vocabulary,
    bos: int | None,
    eos: int | None,
) -> None:
    """Have prompts start and end with these tokens."""
    before = [] if bos is None else [vocabulary.tokens[bos]]
    after = [] if eos is None else [vocabulary.tokens[eos]]
    check_surrounding(metadata, *before, *after)
    if before or after:
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            special_tokens=[(vocabulary.tokens[at], at) for at in (bos, eos) if at is not None],
        )


def _special_id(metadata: Metadata, name: str, vocabulary: _Vocabulary) -> int | None:
    """Return the id that the metadata give for `name`; one beyond the vocabulary is ignored."""
    key = f"{_KEY}{name}_token_id"
    if key not in metadata:
        return None
    found = metadata.integer(key)
    return found if 0 <= found < len(vocabulary.tokens) else None


def _ends(metadata: Metadata, vocabulary: _Vocabulary, eos: int | None) -> frozenset[int]:
    others = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")
    named = (eos, *(_special_id(metadata, name, vocabulary) for name in others))
    found = {at for at in named if at is not None}
    ids = vocabulary.ids()
    found |= {ids[token] for token in _ENDS if token in ids}
    special = (ids[token] for token in _ENDS_IF_SPECIAL if token in ids)
    found |= {at for at in special if vocabulary.types[at] == _CONTROL}
    if all(token in ids for token in _HARMONY):
        found.discard(ids.get("<|end|>", -1))
    return frozenset(found)


def _template(metadata: Metadata, chosen: str | None) -> ChatTemplate | None:
    if chosen is not None:
        return ChatTemplate(chosen)
    named = {}
    if f"{_TEMPLATE}s" in metadata:
        for raw in metadata.strings(f"{_TEMPLATE}s"):
            name = raw.decode(errors="replace")
            if f"{_TEMPLATE}.{name}" in metadata:
                named[name] = metadata.text(f"{_TEMPLATE}.{name}")
    if _TEMPLATE not in metadata:
        return None
    return ChatTemplate(metadata.text(_TEMPLATE), tool_use=named.get("tool_use"))
