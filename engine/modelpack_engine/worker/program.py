"""The program of a worker process: render templates, test tokenizer.json files, decode files.

A hostile file may panic, hang, overflow the stack or exhaust memory; only this process ends.
"""

from __future__ import annotations

import base64
import gc
import importlib
import json
import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelpack_engine.worker import process as frames

if TYPE_CHECKING:
    from modelpack_engine.templates.environment import Renderer

#: How many times longer a normalizer or decoder may make a text.
MAX_GROWTH = 64
#: The most tokens that a tokenizer may add to each text.
MAX_ADDED = 1000
#: The most CPU seconds to encode a few thousand characters, which usually takes milliseconds.
MAX_SECONDS = 0.5
_MAX_SPECIAL = 200

_TEXTS = (
    "",
    " ",
    "Hello, world! It's 12345.67 o'clock.",
    "  leading\n\n\ttabs and \r\n breaks  " * 20,
    "\u00fc\u00df \u4f60\u597d \u0915\u094d\u0937 \U0001f6f8 e\u0301 \u202e\ufeff\u2028",
    "\x00\x01\x7f",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \ufdfa \u0390 \ud55c\uad6d \u2581\u2581 <0x0A>",
    "def f(x):\n    return {'a': [1, 2]}  # <|im_start|> <s> </s>\n",
    "a" * 4000,
    "1" * 4000,
    " " * 4000,
    "\u4f60" * 2000,
)  # fmt: skip


class BadTokenizerError(Exception):
    """A tokenizer.json that cannot be used; the text says why."""


def try_tokenizer(path: str) -> None:
    """Raise `BadTokenizerError` for a tokenizer.json that does not load or misbehaves."""
    import tokenizers

    raw = Path(path).read_bytes()
    try:
        backend = tokenizers.Tokenizer.from_str(raw.decode())
        _check_growth(backend)
        _check_templates(backend)
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        texts = [*_TEXTS, *(token.content for token in list(added.values())[:_MAX_SPECIAL])]
        for special in (True, False):
            backend.encode_special_tokens = special
            for text in texts:
                began = time.process_time()
                ids = backend.encode(text).ids
                if (took := time.process_time() - began) > MAX_SECONDS:
                    raise BadTokenizerError(f"encoding {len(text)} characters took {took:.1f} s")
                backend.decode(ids, skip_special_tokens=special)
                if not text and len(ids) > MAX_ADDED:
                    raise BadTokenizerError(f"it adds {len(ids)} tokens to every text")
        if (count := len(backend.encode("", "").ids)) > MAX_ADDED:
            raise BadTokenizerError(f"it adds {count} tokens to every pair of texts")
        backend.encode(texts[2], texts[3])
        top = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        for token_id in (0, top // 2, top, top + 1):
            backend.decode([max(0, token_id)], skip_special_tokens=False)
    except (BadTokenizerError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise BadTokenizerError(str(error)[:500] or type(error).__name__) from error


def _check_growth(backend: Any) -> None:
    """Reject steps that make texts much longer, which few of the test texts would reveal."""
    for part in ("normalizer", "decoder"):
        step = getattr(backend, part)
        if step is None:
            continue
        growth = 1.0
        for change in _steps(json.loads(step.__getstate__()), ("Replace", "Precompiled")):
            growth *= _growth(change)
        if growth > MAX_GROWTH:
            raise BadTokenizerError(f"its {part} may make a text {growth:.0f} times as long")


def _check_templates(backend: Any) -> None:
    """Reject a template that writes a text more than once."""
    if backend.post_processor is None:
        return
    state = json.loads(backend.post_processor.__getstate__())
    for template in _steps(state, ("TemplateProcessing",)):
        for name in ("single", "pair"):
            parts = [part["Sequence"]["id"] for part in template[name] if "Sequence" in part]
            if len(parts) != len(set(parts)):
                raise BadTokenizerError(f"its post-processor repeats a text ({name})")


def _steps(state: Any, kinds: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the steps of these types, at any depth."""
    waiting = [state]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            if item.get("type") in kinds:
                yield item
            else:
                waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def _growth(step: dict[str, Any]) -> float:
    """Return how many times longer a step may make a text, in characters."""
    if step["type"] == "Precompiled":
        return _longest_normalised(step["precompiled_charsmap"])
    length = len(str(step.get("content", "")))
    pattern = step.get("pattern")
    text = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(text, str) and text:
        return max(1.0, length / len(text))
    return 1.0 + length  # a regular expression may match the empty text between all characters


def _longest_normalised(charsmap: str) -> float:
    """Return the characters of the longest text in SentencePiece's map of normalisations.

    Its format is a trie, whose size in bytes is before it, and texts that end with a null.
    """
    raw = base64.b64decode(charsmap)
    texts = raw[4 + int.from_bytes(raw[:4], "little") :].split(b"\0")
    return max(1.0, *(float(len(text.decode(errors="replace"))) for text in texts))


# A worker that holds this many bytes is replaced, because Python seldom frees memory.
_MAX_RESIDENT = 384 * 1024 * 1024


def main() -> None:
    """Run jobs until standard input ends."""
    memory = int(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server
    source, target = frames.pipes()
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_AS, memory)
    target.write(frames.encoded({"ready": True}))
    target.flush()
    if sys.argv[2] == "render":
        _renderer()
    elif sys.argv[2] == "media":
        with suppress(Exception):  # it may only decode sounds
            importlib.import_module("PIL.Image")
    while (job := frames.read(source)) is not None:
        _allow_seconds(float(job["seconds"]))
        result = _run(job)
        if "error" in result:
            gc.collect()  # the frames of a failed template are in cycles, with its values
        result["last"] = _resident() > _MAX_RESIDENT
        raw = result.pop("raw", None)
        target.write(frames.encoded(result, raw))
        target.flush()


@cache
def _renderer() -> Renderer:
    from modelpack_engine.templates.environment import Renderer

    return Renderer()


def _run(job: Mapping[str, Any]) -> dict[str, Any]:
    if job["kind"] == "tokenizer":
        try:
            try_tokenizer(job["path"])
        except (BadTokenizerError, MemoryError) as error:
            return {"error": str(error) or "it takes too much memory"}
        return {"value": None}
    if job["kind"] in ("picture", "page", "pages"):
        return _decode(job)
    if job["kind"] == "sound":
        return _decode_sound(job)
    if job["kind"] == "video":
        return _decode_video(job)
    from modelpack_engine.templates.environment import TemplateFailedError
    from modelpack_engine.templates.go_template import GoSyntaxError, as_jinja

    try:
        match job["kind"]:
            case "render":
                return {"value": _renderer().render(job["source"], job["variables"])}
            case "check":
                _renderer().check(job["source"])
                return {"value": None}
            case "from_go":
                return {"value": as_jinja(job["source"])}
        raise AssertionError(f"unknown job {job['kind']!r}")
    except (TemplateFailedError, GoSyntaxError) as error:
        return {"error": str(error)}
    except (MemoryError, RecursionError) as error:
        return {"error": f"{type(error).__name__}: it takes too much memory"}
    except Exception as error:  # noqa: BLE001 - an error of one job must not end the worker
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _decode(job: Mapping[str, Any]) -> dict[str, Any]:
    """Decode a picture or a page of a PDF, or count the pages."""
    from modelpack_engine.worker.picture import BadPictureError, decode

    try:
        if job["kind"] == "picture":
            width, height, pixels = decode(job["raw"], job.get("max_side"))
        else:
            from modelpack_engine.worker.document import count_pages, render_page

            if job["kind"] == "pages":
                return {"value": {"count": count_pages(job["raw"])}}
            width, height, pixels = render_page(job["raw"], job["index"])
    except BadPictureError as error:
        return {"value": {"problem": str(error)}}
    except (MemoryError, RecursionError):
        return {"error": "it takes too much memory"}
    return {"value": {"width": width, "height": height}, "raw": pixels}


def _decode_sound(job: Mapping[str, Any]) -> dict[str, Any]:
    from modelpack_engine.worker.sound import BadSoundError, decode

    try:
        samples = decode(job["raw"], job["rate"], job["max_seconds"])
    except BadSoundError as error:
        return {"value": {"problem": str(error)}}
    except (MemoryError, RecursionError):
        return {"error": "it takes too much memory"}
    return {"value": {}, "raw": samples.tobytes()}


def _decode_video(job: Mapping[str, Any]) -> dict[str, Any]:
    from modelpack_engine.worker.video import BadVideoError, Sampling, decode

    try:
        seconds, times, frames = decode(job["raw"], Sampling(**job["sampling"]))
    except BadVideoError as error:
        return {"value": {"problem": str(error)}}
    except (MemoryError, RecursionError):
        return {"error": "it takes too much memory"}
    found = {"seconds": seconds, "times": times, "shape": frames.shape}
    return {"value": found, "raw": frames.tobytes()}


def _limit(which: int, value: int) -> None:
    """Lower a limit, unless the system refuses it (as macOS does for RLIMIT_AS)."""
    hard = resource.getrlimit(which)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    try:
        resource.setrlimit(which, (value, value))
    except (OSError, ValueError):
        return


def _allow_seconds(seconds: float) -> None:
    """Limit the CPU time of this process, in case the server that would kill it is gone."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime + seconds) + 2
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


def _resident() -> int:
    """Return the bytes of memory that this process holds, or their peak if that is unknown."""
    try:
        with open("/proc/self/statm") as file:  # the peak of getrusage includes the parent's
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS has it in bytes
