"""Worker processes: a job that hangs or dies fails alone, and no caller waits forever."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from modelpack_engine.errors import QueueFullError, RequestError
from modelpack_engine.models import chat_template
from modelpack_engine.models.chat_template import ChatTemplate
from modelpack_engine.worker.process import WorkerProcess, python_command
from modelpack_engine.worker.threads import in_thread
from modelpack_engine.worker.workers import JobFailedError, Workers

# A single long operation, which ends only with the process.
ENDLESS = "{{ ('a' * 8000000).rfind(('a' * 4000) ~ 'b' ~ ('a' * 2000000)) }}" * 200
_WAIT = 60


@pytest.fixture
def workers() -> Iterator[Workers]:
    made = Workers()
    yield made
    made.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


def render(workers: Workers, source: str, seconds: float = 30.0, **variables: Any) -> str:
    job = {"kind": "render", "source": source, "variables": variables}
    return str(workers.run(source, job, seconds))


def until(condition: Callable[[], object]) -> None:
    """Wait until the condition holds; workers send no notification of it."""
    waiting = threading.Event()
    for _ in range(_WAIT * 100):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("it does not become true")


def busy(workers: Workers) -> list[WorkerProcess]:
    return [worker for worker in workers._busy.values() if worker is not None]


def test_results_and_failures(workers: Workers) -> None:
    assert render(workers, "{{ x }}é\ud800", x="a\udfff") == "a\udfffé\ud800"
    with pytest.raises(JobFailedError, match=r"^roles must alternate$"):
        render(workers, "{{ raise_exception('roles must alternate') }}")
    [worker] = workers._idle
    assert render(workers, "{{ x }}", x=[1, None, "é"]) == "[1, None, 'é']"
    assert workers._idle == [worker]


def test_a_worker_that_is_started_before_its_first_job(workers: Workers) -> None:
    workers.start()
    [worker] = workers._idle
    workers.start()
    assert render(workers, "{{ x }}", x=1) == "1"
    assert workers._idle == [worker]


@pytest.mark.parametrize("purpose", ["render", "media", "video", "tokenizer"])
def test_each_kind_of_worker_starts(purpose: str) -> None:
    workers = Workers(purpose=purpose)
    try:
        workers.start()
        assert workers.run("job", {"kind": "render", "source": "a", "variables": {}}, 30) == "a"
    finally:
        workers.close()


def test_a_start_that_fails_is_told_by_the_first_job(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    workers.start()
    with pytest.raises(RequestError, match=r"^cannot start a worker process: No such file"):
        render(workers, "a")


@pytest.mark.long
def test_a_job_that_takes_too_long_is_ended(workers: Workers) -> None:
    render(workers, "warm")
    [first] = workers._idle
    with pytest.raises(JobFailedError, match=r"took longer than 0\.2 s"):
        render(workers, ENDLESS, 0.2)
    assert first._process.wait(_WAIT) < 0
    assert render(workers, "{{ x }}", x=1) == "1"


def test_a_killed_worker_fails_its_own_job_only(
    workers: Workers, threads: ThreadPoolExecutor
) -> None:
    slow = threads.submit(render, workers, ENDLESS)
    until(lambda: busy(workers))
    [worker] = busy(workers)
    assert render(workers, "{{ x }}", x=1) == "1"
    worker._process.kill()
    with pytest.raises(JobFailedError, match="its worker process ended"):
        slow.result(_WAIT)
    assert render(workers, "{{ x }}", x=2) == "2"


@pytest.mark.skipif(sys.platform != "linux", reason="no limit on address space elsewhere")
def test_memory_beyond_the_limit_fails_the_job_only() -> None:
    workers = Workers(memory=160 * 1024 * 1024)
    try:
        source = "{% set ns = namespace(l=[]) %}{% for i in range(200) %}{% set ns.l = ns.l + [(i|string) * 1000000] %}{% endfor %}"  # fmt: skip  # noqa: E501
        with pytest.raises(JobFailedError, match="memory"):
            render(workers, source)
        assert render(workers, "{{ x }}", x=1) == "1"
    finally:
        workers.close()


def test_one_template_leaves_a_worker_to_the_others(
    workers: Workers, threads: ThreadPoolExecutor
) -> None:
    slow: list[Future[str]] = [threads.submit(render, workers, ENDLESS) for _ in range(4)]
    until(lambda: busy(workers) and workers._waiters == 3)
    assert render(workers, "{{ x }}", x=1) == "1"
    assert len(busy(workers)) == 1

    def ended() -> bool:
        for worker in busy(workers):
            worker.kill()
        return all(future.done() for future in slow)

    until(ended)
    for future in slow:
        with pytest.raises(JobFailedError):
            future.result(_WAIT)


def test_two_templates_of_a_model_take_one_worker(
    workers: Workers, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "shared_workers", lambda: workers)
    slow = ChatTemplate(ENDLESS, tool_use="tools: " + ENDLESS)
    jobs = [threads.submit(slow.render, {"tools": tools}) for tools in ([], [{}], [], [{}])]
    until(lambda: busy(workers) and workers._waiters == 3)
    assert len(busy(workers)) == 1
    assert ChatTemplate("{{ x }}").render({"x": 1}) == "1"

    def ended() -> bool:
        for worker in busy(workers):
            worker.kill()
        return all(job.done() for job in jobs)

    until(ended)
    for job in jobs:
        with pytest.raises(RequestError, match="the model's chat template failed"):
            job.result(_WAIT)


def test_too_many_waiting_jobs_are_refused(threads: ThreadPoolExecutor) -> None:
    workers = Workers(count=1, waiting=0)
    try:
        render(workers, "free")
        slow = threads.submit(render, workers, ENDLESS)
        until(lambda: busy(workers))
        with pytest.raises(QueueFullError, match="wait for their chat template"):
            render(workers, "other")
    finally:
        workers.close()
    with pytest.raises(JobFailedError):
        slow.result(_WAIT)


def test_cancelling_ends_the_work(workers: Workers) -> None:
    asyncio.run(cancel_running_and_waiting(workers))


async def cancel_running_and_waiting(workers: Workers) -> None:
    task = asyncio.create_task(in_thread(render, workers, ENDLESS))
    await asyncio.to_thread(until, lambda: busy(workers))
    [worker] = busy(workers)
    waiting = asyncio.create_task(in_thread(render, workers, ENDLESS))
    await asyncio.to_thread(until, lambda: workers._waiters)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.to_thread(until, lambda: not workers._waiters)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(worker._process.wait, _WAIT) < 0
    assert await in_thread(render, workers, "{{ x }}", x=1) == "1"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_has_no_secrets(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    render(workers, "x")
    [worker] = workers._idle
    assert b"hf_secret" not in Path(f"/proc/{worker.pid}/environ").read_bytes()
    assert b"TOKENIZERS_PARALLELISM" in Path(f"/proc/{worker.pid}/environ").read_bytes()


def test_a_worker_loads_no_array_library() -> None:
    code = (
        "import modelpack_engine.worker.program, modelpack_engine.templates.environment, sys;"
        "print(*{m.split('.')[0] for m in sys.modules})"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout.split()
    assert "jinja2" in loaded
    assert not {"mlx", "mlx_lm", "numpy", "tokenizers", "fastapi"} & set(loaded)


@pytest.mark.parametrize("flags", [(), ("-I", "-S")])
def test_a_process_runs_no_file_of_the_current_directory(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "json.py").write_text("print('of the current directory')\n")
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "started.py").write_text("def main(): print('as asked')\n")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    command = python_command("started", flags=flags)
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.stdout, found.stderr) == ("as asked\n", "")
