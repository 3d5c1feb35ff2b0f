"""BatchRunner: runs the requests of batches in the background, and continues after a restart.

Each request goes through the server's own application as a client's would, with the API key that
created the batch, at low priority. Below the directory of `StoredFiles`, a batch has these files::

    batches/<id>.json       the batch (`Batch`)
    batches/<id>.in         its input, which stays if the uploaded file is deleted
    batches/<id>.out, .err  a line for each request that has ended; they become files at the end
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Scope

from modelpack.errors import ModelpackError
from modelpack.store.filesystem import map_os_errors, write_all
from modelpack_server.api.openai.batch_input import (
    Line,
    LineError,
    key_of,
    read_lines,
    validate,
)
from modelpack_server.api.openai.stored_batches import (
    PARTS,
    Batch,
    Ending,
    Sender,
    delete_parts,
    error_object,
    read_batches,
)
from modelpack_server.api.openai.stored_files import (
    KEPT_FOR,
    StoredFile,
    StoredFiles,
    link_or_copy,
    write_document,
)
from modelpack_server.gateway.caller import Background, put_background
from modelpack_server.gateway.families import Family, error_body

_log = logging.getLogger(__name__)

#: The requests of all batches that run at a time, and the batches whose requests these are.
MAX_IN_FLIGHT = 8
MAX_RUNNING = 16
#: The unfinished batches of an owner, and all batches of an owner and of the server.
MAX_UNFINISHED = 32
MAX_OWNER_BATCHES, MAX_BATCHES = 1000, 10_000
#: The bytes of the replies to a request, and to all requests of a batch.
MAX_REPLY_BYTES = 16 * 1024 * 1024
MAX_OUTPUT_BYTES = 512 * 1024 * 1024
#: The seconds that a batch has: OpenAI's completion_window "24h".
WINDOW = 24 * 3600.0

_TICK = 60.0  # seconds between looks for expired files
_LOCKED_TICK = 1.0  # and for a directory that becomes free
_SHUTDOWN = 5.0  # seconds for requests to notice that the server stops
_AHEAD = 16  # lines that are read at a time
_REST = {
    "cancelled": ("batch_cancelled", "The batch was cancelled before this request was executed."),
    "expired": ("batch_expired", "The batch expired before this request was executed."),
}


@dataclass(frozen=True, slots=True)
class Reply:
    """The response to a request of a batch; `body` is None if it exceeds `MAX_REPLY_BYTES`."""

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes | None

    @property
    def retry_after(self) -> float | None:
        """The seconds after which to send the request again; None: the response is final."""
        text = self.headers.get(b"retry-after", b"").decode("latin-1")
        if self.status not in (429, 503) or not (text.isascii() and text.isdigit()):
            return None
        return None if self.headers.get(b"x-should-retry") == b"false" else min(float(text), _TICK)


class BatchRunner:
    """The batches of a server."""

    def __init__(self, files: StoredFiles) -> None:
        self.slots = asyncio.Semaphore(MAX_IN_FLIGHT)
        self.files = files
        self._app: ASGIApp | None = None
        self._is_protected = False
        self._batches: dict[str, Batch] = {}
        self._creating: set[str] = set()  # batches whose files are not written yet
        self._runs: dict[str, _Run] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._opening = asyncio.Lock()
        self._saving = asyncio.Lock()
        self._folder: Path | None = None
        self._wake = asyncio.Event()
        self._main: asyncio.Task[None] | None = None
        self._is_stopping = False

    def enter(self, protected: ASGIApp | None, *, unprotected: ASGIApp) -> None:
        """Set the application that gets the requests, with or without checks of API keys."""
        self._app, self._is_protected = protected or unprotected, protected is not None

    async def start(self) -> None:
        """Begin to run batches, those of an earlier run of the server included."""
        self._main = asyncio.create_task(self._run_all())

    def interrupt(self) -> None:
        """Drop the requests that run, and send no more; they are sent again at the next start."""
        self._is_stopping = True
        if self._main is not None:
            self._main.cancel()
        for run in self._runs.values():
            run.end("shutdown")

    async def stop(self) -> None:
        """Stop at once, and release the directory."""
        self.interrupt()
        tasks = [task for task in (self._main, *self._tasks.values()) if task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=_SHUTDOWN)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self.files.close)

    async def create(
        self, sender: Sender, file: StoredFile, *, endpoint: str,
        metadata: dict[str, str] | None = None, output_seconds: float = KEPT_FOR,
    ) -> Batch:  # fmt: skip
        """Begin a batch with the requests in `file`; raises `RequestError`, and a 429."""
        folder = await self._open()
        self._check_number(sender.owner)
        now = self.files.clock()
        batch = Batch(
            f"batch_{uuid.uuid4().hex}", sender.owner, sender.key, sender.headers, sender.client,
            endpoint, file.id, file.bytes, metadata, output_seconds, now, now + WINDOW,
        )  # fmt: skip
        self.files.reserve(batch.owner, batch.input_bytes)
        self._batches[batch.id] = batch
        self._creating.add(batch.id)

        def store() -> None:
            target = folder / f"{batch.id}.in"
            with map_os_errors("store", target):
                try:
                    link_or_copy(self.files.path(file), target)
                    self._save(batch)
                except BaseException:
                    target.unlink(missing_ok=True)  # no limit would count it
                    raise

        try:
            await asyncio.to_thread(store)
        except BaseException:
            del self._batches[batch.id]
            self.files.reserve(batch.owner, -batch.input_bytes)
            raise
        finally:
            self._creating.discard(batch.id)
        self._wake.set()
        return batch

    async def list(self, owner: str | None) -> list[Batch]:
        """Return the batches of an owner, the newest first."""
        await self._open()
        return [batch for batch in reversed(self._batches.values()) if batch.owner == owner]

    async def find(self, owner: str | None, name: str) -> Batch:
        """Return the batch with this id; raises a 404."""
        await self._open()
        batch = self._batches.get(name)
        if batch is None or batch.owner != owner:
            raise HTTPException(404, f"no such batch: {name[:100]!r}")
        return batch

    async def cancel(self, owner: str | None, name: str) -> Batch:
        """Cancel a batch, which ends soon; raises a 404, and a 409 for a batch that has ended."""
        batch = await self.find(owner, name)
        if batch.is_final or batch.status == "finalizing":
            raise HTTPException(409, f"cannot cancel a batch with the status {batch.status}")
        if batch.status != "cancelling":
            if (run := self._runs.get(batch.id)) is not None:
                run.end("cancelled")
            await self.set_status(batch, "cancelling")
        return batch

    async def set_status(self, batch: Batch, status: str) -> None:
        """Change and store the status of a batch."""
        batch.status = status
        batch.times[status] = int(self.files.clock())
        await self.save(batch)

    async def save(self, batch: Batch) -> None:
        """Store the attributes of a batch."""
        async with self._saving:
            await asyncio.to_thread(self._save, batch)

    async def ask(self, batch: Batch, line: Line, stop: asyncio.Event) -> Reply | None:
        """Return the response to a line's request; None if `stop` was set first."""
        assert self._app is not None, "the server has not started"
        if batch.owner is not None and not self._is_protected:
            body = error_body(Family.OPENAI, 401, "the API key of the batch cannot be checked")
            return Reply(401, {}, json.dumps(body).encode())
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json"),
                   (b"content-length", b"%d" % len(line.body))]  # fmt: skip
        headers += [(name.encode(), value.encode()) for name, value in batch.headers]
        scope: Scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1", "method": "POST", "scheme": "http", "path": batch.endpoint,
            "raw_path": batch.endpoint.encode(), "query_string": b"", "root_path": "",
            "headers": headers, "client": (batch.client, 0), "server": ("127.0.0.1", 80),
            "extensions": {}, "state": {},
        }  # fmt: skip
        put_background(scope, Background(batch.key))
        bodies = [line.body]
        status, received, size = 0, dict[bytes, bytes](), 0
        pieces: list[bytes] = []

        async def receive() -> Message:
            if bodies:
                return {"type": "http.request", "body": bodies.pop(), "more_body": False}
            await stop.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                received.update((name.lower(), value) for name, value in message["headers"])
            elif message["type"] == "http.response.body":
                piece = message.get("body", b"")
                size += len(piece)
                if size <= MAX_REPLY_BYTES:
                    pieces.append(bytes(piece))
                else:
                    pieces.clear()

        try:
            await self._app(scope, receive, send)
        except Exception:  # noqa: BLE001 - it fails its own line only
            _log.exception("a request of the batch %s failed", batch.id)
            status, pieces = 500, [json.dumps(error_body(Family.OPENAI, 500, "failed")).encode()]
        if stop.is_set() and status != 200:
            return None
        return Reply(status, received, None if size > MAX_REPLY_BYTES else b"".join(pieces))

    async def _open(self) -> Path:
        """Read the stored batches, if that has not happened yet; return their directory.

        Raises `LockedError` if another server has the directory.
        """
        async with self._opening:
            if self._folder is None:
                folder = await asyncio.to_thread(self.files.open) / "batches"
                for batch in await asyncio.to_thread(read_batches, folder):
                    self._batches[batch.id] = batch
                    if not batch.is_final:
                        self.files.reserve(batch.owner, batch.input_bytes, check=False)
                self._folder = folder
                self._wake.set()
            return self._folder

    async def _run_all(self) -> None:
        was_locked = False
        while not self._is_stopping:  # Python 3.11's `wait_for` may lose a cancellation
            try:
                if self.files.exists:
                    await self._open()
                    await asyncio.to_thread(self.files.sweep)
                    await self._forget_old()
                was_locked = False
            except (ModelpackError, OSError) as error:
                if not was_locked:
                    _log.warning("files and batches cannot be used: %s", error)
                was_locked = True
            if self._folder is not None:
                self._begin_due()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _LOCKED_TICK if was_locked else _TICK)
            self._wake.clear()

    def _begin_due(self) -> None:
        """Start batches: the oldest of the owner with the fewest that run."""
        begun = self._tasks.keys() | self._creating
        waiting = [b for b in self._batches.values() if not b.is_final and b.id not in begun]
        while waiting and len(self._tasks) < MAX_RUNNING:
            owners = [self._batches[name].owner for name in self._tasks]
            batch = min(waiting, key=lambda each: (owners.count(each.owner), each.created))
            waiting.remove(batch)
            self._tasks[batch.id] = asyncio.create_task(self._run(batch))

    async def _run(self, batch: Batch) -> None:
        assert self._folder is not None
        run = self._runs[batch.id] = _Run(self, batch, self._folder / batch.id)
        try:
            await run.run()
        except Exception as error:  # noqa: BLE001 - it fails this batch only
            _log.exception("the batch %s failed", batch.id)
            batch.errors.append(error_object("server_error", f"unexpected {type(error).__name__}"))
            batch.ending = "failed"
            with suppress(ModelpackError, OSError):
                await self.set_status(batch, "failed")
            batch.status = "failed"
        finally:
            del self._runs[batch.id], self._tasks[batch.id]
            if batch.is_final:
                self.files.reserve(batch.owner, -batch.input_bytes)
            self._wake.set()

    def _check_number(self, owner: str | None) -> None:
        mine = [batch for batch in self._batches.values() if batch.owner == owner]
        unfinished = sum(not batch.is_final for batch in mine)
        for count, limit, what in (
            (unfinished, MAX_UNFINISHED, "unfinished batches"),
            (len(mine), MAX_OWNER_BATCHES, "batches"),
            (len(self._batches), MAX_BATCHES, "batches of all API keys"),
        ):
            if count >= limit:
                raise HTTPException(
                    429, f"the limit of {limit} {what} is reached", {"x-should-retry": "false"}
                )

    async def _forget_old(self) -> None:
        """Delete the batches that ended long ago, as their files were."""
        before = self.files.clock() - KEPT_FOR - WINDOW
        for batch in [b for b in self._batches.values() if b.is_final and b.created < before]:
            del self._batches[batch.id]
            assert self._folder is not None
            await asyncio.to_thread(delete_parts, self._folder / batch.id, (".json", *PARTS))

    def _save(self, batch: Batch) -> None:
        assert self._folder is not None
        path = self._folder / f"{batch.id}.json"
        with map_os_errors("write", path):
            write_document(path, asdict(batch))


class _Run:
    """Runs one batch until it ends or the server stops."""

    def __init__(self, runner: BatchRunner, batch: Batch, base: Path) -> None:
        self._runner = runner
        self._batch = batch
        self._base = base
        self._stop = asyncio.Event()
        self._why: str | None = None
        self._writing = asyncio.Lock()
        self._done: set[bytes] = set()  # hashes of the ids of lines that have ended
        self._bytes = 0  # of output and errors

    def end(self, why: str) -> None:
        """Send no more requests, and drop those that run; `why` is an `Ending`, or shutdown."""
        if self._why is None:
            self._why = why
            self._stop.set()

    async def run(self) -> None:
        batch, set_status = self._batch, self._runner.set_status
        if batch.status == "validating":
            await self._validate()
        if self._why == "shutdown":
            return
        if batch.ending is None:
            await self._process()
            if self._why == "shutdown":
                return
            batch.ending = self._ending()
        if batch.status == "in_progress":
            await set_status(batch, "finalizing")
        else:
            await self._runner.save(batch)
        await self._finish(batch.ending)

    def _ending(self) -> Ending:
        match self._why:
            case "cancelled" | "expired" | "failed":
                return self._why
        return "completed"

    async def _validate(self) -> None:
        batch = self._batch
        path, stopped = self._base.with_suffix(".in"), self._stop.is_set
        found = await asyncio.to_thread(validate, path, batch.endpoint, stopped=stopped)
        if self._stop.is_set():
            return
        if found.errors:
            batch.errors = [error_object(e.code, e.message, e.line, e.param) for e in found.errors]
            batch.ending = "failed"
            return
        batch.total, batch.model = found.total, found.model
        await self._runner.set_status(batch, "in_progress")

    async def _process(self) -> None:
        """Send the requests of the lines that have not ended."""
        batch = self._batch
        await asyncio.to_thread(self._recover)
        if batch.status == "cancelling":
            self.end("cancelled")
        left = batch.expires - self._runner.files.clock()
        timer = asyncio.get_running_loop().call_later(max(0.0, left), self.end, "expired")
        running: set[asyncio.Task[None]] = set()
        try:
            lines = self._lines()
            while not self._stop.is_set():
                part = await asyncio.to_thread(lambda: list(islice(lines, _AHEAD)))
                if not part:
                    break
                for line in part:
                    while len(running) >= MAX_IN_FLIGHT:
                        running = await self._some(running)
                    if self._stop.is_set():
                        break
                    running.add(asyncio.create_task(self._answer(line)))
            while running:
                running = await self._some(running)
        finally:
            timer.cancel()
            for task in running:
                task.cancel()
        if self._why in _REST and batch.total:  # a batch may be cancelled before its validation
            await asyncio.to_thread(self._write_rest, *_REST[self._why])

    async def _some(self, running: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
        """Return the tasks that run when one has ended; raise what it raised."""
        ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        try:
            for task in ended:
                task.result()
        except BaseException:
            for task in running:
                task.cancel()
            raise
        return running

    def _lines(self) -> Iterator[Line]:
        """Yield the lines that have not ended."""
        for line in read_lines(self._base.with_suffix(".in"), self._batch.endpoint):
            assert not isinstance(line, LineError), "the input was validated"
            if line.key not in self._done:
                yield line

    async def _answer(self, line: Line) -> None:
        """Send the request of a line until the response is final, and record that."""
        while True:
            async with self._runner.slots:
                if self._stop.is_set():
                    return
                reply = await self._runner.ask(self._batch, line, self._stop)
            if reply is None:
                return
            if (seconds := reply.retry_after) is None:
                break
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), seconds)
                return
        try:
            await self._locked(lambda: self._record(line, reply))
        except ModelpackError as error:
            self._fail("storage_full", f"cannot store a reply: {error}")
        if self._bytes > MAX_OUTPUT_BYTES:
            self._fail("output_too_large", f"the replies exceed {MAX_OUTPUT_BYTES} bytes")

    async def _locked(self, write: Callable[[], None]) -> None:
        async with self._writing:
            await asyncio.to_thread(write)

    def _fail(self, code: str, message: str) -> None:
        if self._why is None:
            self._batch.errors.append(error_object(code, message))
        self.end("failed")

    def _record(self, line: Line, reply: Reply) -> None:
        request_id = reply.headers.get(b"x-request-id", b"").decode("latin-1")
        response = {"status_code": reply.status, "request_id": request_id, "body": None}
        error = None
        try:
            response["body"] = json.loads(reply.body or b"")
        except ValueError:
            text = "the reply is too large" if reply.body is None else "the reply is not JSON"
            error = {"code": "invalid_reply", "message": text}
        succeeded = reply.status == 200 and error is None
        row = {"id": _row_id(), "custom_id": line.custom_id, "response": response, "error": error}
        self._append(".out" if succeeded else ".err", [row])
        self._done.add(line.key)
        self._batch.count(response["body"])
        self._batch.completed += succeeded
        self._batch.failed += not succeeded

    def _write_rest(self, code: str, message: str) -> None:
        """Record an error for each line that has not ended."""
        error = {"code": code, "message": message}
        lines = self._lines()
        while part := list(islice(lines, 100)):
            rows = [
                {"id": _row_id(), "custom_id": line.custom_id, "response": None, "error": error}
                for line in part
            ]
            self._append(".err", rows)

    def _append(self, suffix: str, rows: list[dict[str, Any]]) -> None:
        text = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        path = self._base.with_suffix(suffix)
        with map_os_errors("write", path), path.open("ab", buffering=0) as stream:
            size = stream.tell()
            try:
                write_all(stream.fileno(), memoryview(text))
            except OSError:
                os.truncate(path, size)
                raise
        self._bytes += len(text)

    def _recover(self) -> None:
        """Read which lines ended in an earlier run; a line that was half written did not."""
        batch = self._batch
        batch.completed = batch.failed = 0
        batch.usage.clear()
        for suffix in (".out", ".err"):
            path = self._base.with_suffix(suffix)
            if not path.exists():
                continue
            whole = 0
            with path.open("rb") as stream:
                for raw in stream:
                    try:
                        row: Any = json.loads(raw) if raw.endswith(b"\n") else None
                        self._done.add(key_of(row["custom_id"]))
                        batch.count((row["response"] or {}).get("body"))
                    except (ValueError, TypeError, KeyError, AttributeError):
                        _log.warning("%s: dropping a line that is not complete", path)
                        break
                    whole += len(raw)
                    batch.completed += suffix == ".out"
                    batch.failed += suffix == ".err" and row["response"] is not None
            os.truncate(path, whole)
            self._bytes += whole

    async def _finish(self, ending: Ending) -> None:
        """Make files of the output and the errors, and set the final status."""
        batch, runner = self._batch, self._runner
        for suffix, field_name in ((".out", "output"), (".err", "error")):
            path, attribute = self._base.with_suffix(suffix), f"{field_name}_file_id"
            name = getattr(batch, attribute)
            if name is None and not path.exists():
                continue
            if name is None:
                name = f"file-{uuid.uuid4().hex}"
                setattr(batch, attribute, name)
                await runner.save(batch)
            if path.exists():
                await asyncio.to_thread(
                    runner.files.add, batch.owner, path, purpose="batch_output",
                    filename=f"{batch.id}_{field_name}.jsonl", seconds=batch.output_seconds,
                    name=name,
                )  # fmt: skip
        await runner.set_status(batch, ending)
        await asyncio.to_thread(delete_parts, self._base, PARTS)


def _row_id() -> str:
    return f"batch_req_{uuid.uuid4().hex}"
