"""Tokenizers from tokenizer.json, which a worker process tests before this process loads them."""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import tokenizers

from modelpack.artifacts.model import CHAT_TEMPLATE
from modelpack_engine.errors import ModelLoadError, as_error
from modelpack_engine.models.chat_template import ChatTemplate
from modelpack_engine.models.files import ModelFiles
from modelpack_engine.models.tokenizer import Tokenizer, TokenText
from modelpack_engine.worker.process import (
    WorkerDiedError,
    WorkerProcess,
    WorkerTimeoutError,
    encoded,
)

#: Seconds for loading a tokenizer and encoding a few texts.
MAX_SECONDS = 60.0
# Address space: of the process, for each byte of the file, and in all.
_BASE_MEMORY = 1 << 30
_MEMORY_PER_BYTE = 64
_MAX_MEMORY = 8 << 30

_checks: dict[bytes, Future[None]] = {}
_lock = threading.Lock()


def begin_check(text: str) -> Future[None]:
    """Start to test the tokenizer.json `text`; a process tests the same text once.

    The future raises `ModelLoadError` if loading the text or encoding with it fails, hangs or takes
    too much memory.
    """
    raw = text.encode("utf-8", errors="surrogatepass")
    digest = hashlib.sha256(raw).digest()
    with _lock:
        known = _checks.get(digest)
        if known is not None and not (known.done() and known.exception()):
            return known
        check = _checks[digest] = Future[None]()

    def run() -> None:
        try:
            _try(raw)
        except BaseException as error:  # noqa: BLE001 - the future raises it again
            check.set_exception(error)
        else:
            check.set_result(None)

    threading.Thread(target=run, name="modelpack-tokenizer-check", daemon=True).start()
    return check


def _try(raw: bytes) -> None:
    memory = min(_BASE_MEMORY + _MEMORY_PER_BYTE * len(raw), _MAX_MEMORY)
    with tempfile.NamedTemporaryFile(prefix="modelpack-tokenizer-", suffix=".json") as file:
        file.write(raw)
        file.flush()
        job = {"kind": "tokenizer", "path": file.name, "seconds": MAX_SECONDS}
        try:
            worker = WorkerProcess(memory, purpose="tokenizer")
        except OSError as error:
            raise ModelLoadError(
                f"tokenizer.json: cannot start a process to test it: {error.strerror}"
            ) from error
        try:
            answer = json.loads(worker.call(encoded(job), MAX_SECONDS))
        except WorkerTimeoutError:
            raise ModelLoadError(
                f"tokenizer.json: the test took longer than {MAX_SECONDS:g} s"
            ) from None
        except WorkerDiedError:
            raise ModelLoadError(
                "tokenizer.json: the test crashed, or took too much memory or time"
            ) from None
        finally:
            worker.close()
    if "error" in answer:
        raise ModelLoadError(f"tokenizer.json: {answer['error']}")


_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


def tokenizer_of(files: ModelFiles, config: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer of a model; `config` is its config.json.

    Raises `ModelLoadError` if tokenizer.json is missing or invalid.
    """
    text = text_of(files)
    begin_check(text).result()
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except BaseException as error:  # the library raises nothing more precise
        raise ModelLoadError(f"tokenizer.json: {as_error(error, 'loading')}"[:600]) from error
    backend.no_truncation()
    backend.no_padding()
    settings = files.json("tokenizer_config.json") or {}
    generation = files.json("generation_config.json") or {}
    named = _named_tokens(settings)
    token_text, strips = _token_text(backend)
    bos = backend.token_to_id(named["bos_token"]) if "bos_token" in named else None
    return Tokenizer(
        backend,
        text=token_text,
        eos_token_ids=_ends(backend, named, generation, config),
        bos=bos,
        special_tokens=named,
        chat_template=chat_template_of(files, settings),
        strip_leading_space=strips,
    )


def text_of(files: ModelFiles) -> str:
    """Return the text of tokenizer.json. Raises `ModelLoadError` if it is missing."""
    text = files.text("tokenizer.json")
    if text is None:
        raise ModelLoadError(
            "the model has no tokenizer.json",
            hint="package tokenizer.json beside the weights; transformers'"
            " `AutoTokenizer.from_pretrained(…).save_pretrained(…)` writes one",
        )
    return text


def chat_template_of(
    files: ModelFiles, settings: Mapping[str, Any] | None = None
) -> ChatTemplate | None:
    """Return the model's chat template; a separate file takes precedence over the config's."""
    if settings is None:
        settings = files.json("tokenizer_config.json") or {}
    named: dict[str, str] = {}
    found = settings.get("chat_template")
    if isinstance(found, str):
        named["default"] = found
    elif isinstance(found, list):
        for entry in found:
            if isinstance(entry, dict) and isinstance(entry.get("template"), str):
                named[str(entry.get("name"))] = entry["template"]
    own = files.text(CHAT_TEMPLATE)
    if own is not None:
        named["default"] = own
    if "default" not in named:
        return None
    return ChatTemplate(named["default"], tool_use=named.get("tool_use"))


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of special tokens by their names; they are strings or objects."""
    named = {}
    for name in _NAMED:
        value = settings.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            named[name] = value
    return named


def _ends(
    backend: tokenizers.Tokenizer, named: Mapping[str, str], *configs: Mapping[str, Any]
) -> frozenset[int]:
    """Return the ids that end a text: those of the first config with any, and the eos token's."""
    found: set[int] = set()
    for config in configs:
        value = config.get("eos_token_id")
        if value is None and isinstance(config.get("text_config"), dict):
            value = config["text_config"].get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        found = {at for at in ids if isinstance(at, int)}
        if found:
            break
    if "eos_token" in named:
        own = backend.token_to_id(named["eos_token"])
        if own is not None:
            found.add(own)
    return frozenset(found)


def _token_text(backend: tokenizers.Tokenizer) -> tuple[TokenText, bool]:
    """Return how the vocabulary writes tokens, and whether decoding removes a leading space."""
    decoder = backend.decoder
    if decoder is None:
        return TokenText.OTHER, False
    described = decoder.__getstate__().decode()
    if '"ByteLevel"' in described:
        return TokenText.BYTE_LEVEL, False
    if "▁" not in described:
        return TokenText.OTHER, False
    strips = '"Strip"' in described or (
        '"Metaspace"' in described and '"prepend_scheme":"never"' not in described
    )
    return TokenText.SENTENCEPIECE, strips
