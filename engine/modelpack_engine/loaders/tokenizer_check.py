"""begin_check: try a tokenizer.json out in a worker process before it is loaded here."""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
from concurrent.futures import Future

from modelpack_engine.errors import ModelLoadError
from modelpack_engine.worker.frames import encoded
from modelpack_engine.worker.process import WorkerDiedError, WorkerProcess, WorkerTimeoutError

#: Seconds for loading a tokenizer and encoding a few texts.
MAX_SECONDS = 60.0
# Address space: of the process, for each byte of the file, and in all.
_BASE_MEMORY = 1 << 30
_MEMORY_PER_BYTE = 64
_MAX_MEMORY = 8 << 30

_checks: dict[bytes, Future[None]] = {}
_lock = threading.Lock()


def begin_check(text: str) -> Future[None]:
    """Begin to try `text` out, in a thread; the same text is tried once by this process.

    The future fails with `ModelLoadError` if loading it or encoding with it fails, hangs or takes
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
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits for it
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
                f"tokenizer.json: no process can be started to check it: {error.strerror}"
            ) from error
        try:
            answer = json.loads(worker.call(encoded(job), MAX_SECONDS))
        except WorkerTimeoutError:
            raise ModelLoadError(
                f"tokenizer.json: trying it out took longer than {MAX_SECONDS:g} s"
            ) from None
        except WorkerDiedError:
            raise ModelLoadError(
                "tokenizer.json: trying it out crashed, or took too much memory or time"
            ) from None
        finally:
            worker.close()
    if "error" in answer:
        raise ModelLoadError(f"tokenizer.json: {answer['error']}")
