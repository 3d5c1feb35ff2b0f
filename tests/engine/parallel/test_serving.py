"""`modelpack serve --tensor-parallel-size 2` over HTTP: replies, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import modelpack
from modelpack.builder.request import PackageRequest
from modelpack.formats.adapter import read_adapter
from modelpack.store.layout import LayoutStore
from modelpack_engine.request import EngineRequest, SamplingParams
from tests.adapters import write_peft
from tests.engine.adapters.test_zoo import linears
from tests.engine.parallel.ranks import ENVIRONMENT
from tests.engine.serving.test_engine import run
from tests.engine.serving.tiny import tiny_engine, tiny_model, write_tiny
from tests.engine.zoo.catalogue import CATALOGUE
from tests.engine.zoo.configuration import COMMON

SERVE = ["serve", "--port", "0", "--device", "cpu", "--max-num-seqs", "4"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the tiny model, as "ai/tiny", and one that cannot be divided, as "ai/gpt2"."""
    root = tmp_path_factory.mktemp("served")
    store = LayoutStore(root / "store")
    tiny = write_tiny(root / "tiny")
    modelpack.package("ai/tiny", PackageRequest(safetensors_dir=tiny), store=store)
    [configuration] = [c for c in CATALOGUE if c.id == "gpt2"]
    other = write_tiny(root / "gpt2")
    weights = dict(tree_flatten(configuration.build().parameters()))
    mx.save_safetensors(str(other / "model.safetensors"), weights, metadata={"format": "pt"})
    arguments = {"model_type": "gpt2", **COMMON, **configuration.args}
    (other / "config.json").write_text(json.dumps(arguments))
    modelpack.package("ai/gpt2", PackageRequest(safetensors_dir=other), store=store)
    return root / "store"


class Server:
    """A process that serves; `url` is what it printed."""

    def __init__(self, process: subprocess.Popen[str], errors: Path) -> None:
        self.process = process
        self._errors = errors
        assert process.stdout is not None
        self.url = process.stdout.readline().strip()
        assert self.url, self.errors()

    def errors(self) -> str:
        return self._errors.read_text()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while httpx.get(f"{self.url}/health").status_code != 200:
            assert time.monotonic() < deadline
            assert self.process.poll() is None, self.errors()
            time.sleep(0.1)

    def complete(self, **body: Any) -> Any:
        given = {"model": "ai/tiny", "prompt": "hello world", "max_tokens": 12} | body
        return httpx.post(f"{self.url}/v1/completions", json=given, timeout=60)

    def rank(self, number: int) -> int:
        """Return the process of a rank."""
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        children = " ".join(thread.read_text() for thread in threads)
        for pid in children.split():
            if f"MLX_RANK={number}".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                return int(pid)
        raise AssertionError(f"no rank {number} among {children}")


@contextmanager
def serving(
    store: Path, errors: Path, *arguments: str, launcher: list[str] | None = None
) -> Iterator[Server]:
    command = [*(launcher or []), sys.executable, "-m", "modelpack", *SERVE, *arguments]
    environ = {**ENVIRONMENT, "MODELPACK_STORE": str(store)}
    with (
        errors.open("w") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, env=environ
        ) as process,
    ):
        try:
            yield Server(process, errors)
        finally:
            process.terminate()
            try:
                process.wait(20)
            finally:
                process.kill()


def expected(**params: Any) -> str:
    """The reply of one device."""
    engine = tiny_engine()
    [events] = engine.generate(["hello world"], SamplingParams(max_tokens=12, **params))
    return "".join(event.text for event in events)


def check_answers(server: Server) -> None:
    for params in ({"temperature": 0}, {"temperature": 1.0, "seed": 3}):
        answer = server.complete(**params)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == expected(**params)


@pytest.mark.long
def test_answers_and_then_a_rank_is_killed(store: Path, tmp_path: Path) -> None:
    with serving(store, tmp_path / "err", "ai/tiny", "--tensor-parallel-size", "2") as server:
        server.wait_until_ready()
        check_answers(server)
        leader = server.rank(0)
        os.kill(server.rank(1), signal.SIGKILL)
        assert server.process.wait(10) == 1
        with pytest.raises(ProcessLookupError):
            os.kill(leader, 0)
    assert "rank 1 of 2 ended: its connection was closed" in server.errors()


@pytest.mark.long
def test_ctrl_c_lets_requests_finish_and_ends_all(store: Path, tmp_path: Path) -> None:
    with serving(store, tmp_path / "err", "ai/tiny", "--tensor-parallel-size", "2") as server:
        server.wait_until_ready()
        body = {"model": "ai/tiny", "prompt": "a", "max_tokens": 200, "stream": True}
        body |= {"ignore_eos": True, "temperature": 0}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            ranks = [server.rank(0), server.rank(1)]
            server.process.send_signal(signal.SIGINT)
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert server.process.wait(20) == 0
    for pid in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.long
def test_a_launcher_that_is_killed_takes_all_with_it(store: Path, tmp_path: Path) -> None:
    with serving(store, tmp_path / "err", "ai/tiny", "--tensor-parallel-size", "2") as server:
        server.wait_until_ready()
        ranks = [server.rank(0), server.rank(1)]
        server.process.kill()
        deadline = time.monotonic() + 10
        while any(is_alive(pid) for pid in ranks):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.long
def test_what_cannot_be_divided_is_refused_by_name(store: Path, tmp_path: Path) -> None:
    """Other models are still served, one at a time."""
    with serving(store, tmp_path / "err", "--tensor-parallel-size", "2") as server:
        refused = server.complete(model="ai/gpt2")
        assert refused.status_code >= 400
        assert "mlx-lm cannot divide the architecture 'gpt2'" in refused.text
        check_answers(server)
        httpx.post(f"{server.url}/pool/unload", json={"models": ["ai/tiny"]}).raise_for_status()
        check_answers(server)  # the ranks load it again


@pytest.mark.long
def test_heads_that_cannot_be_divided(store: Path, tmp_path: Path) -> None:
    options = ("--tensor-parallel-size", "3", "--keep-going")
    with serving(store, tmp_path / "err", *options) as server:
        answer = server.complete()
        assert answer.status_code >= 400
        assert "llama has 4 attention heads, which 3 devices cannot share equally" in answer.text


@pytest.mark.long
def test_ranks_that_mlx_launch_started(store: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launcher = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2"]
    launcher += ["--backend", "ring", "--starting-port", str(port), "--"]
    arguments = ("ai/tiny", "--tensor-parallel-size", "2")
    with serving(store, tmp_path / "err", *arguments, launcher=launcher) as server:
        server.wait_until_ready()
        ranks = [server.rank(0), server.rank(1)]
        try:
            check_answers(server)
            os.kill(ranks[0], signal.SIGINT)  # mlx.launch itself would leave them running
            assert server.process.wait(30) == 0
            assert not any(is_alive(pid) for pid in ranks)
        finally:
            for pid in filter(is_alive, ranks):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.long
def test_a_rank_that_nobody_asked_to_be_one() -> None:
    command = [sys.executable, "-m", "modelpack", *SERVE]
    environ = {**ENVIRONMENT, "MLX_RANK": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60)
    assert done.returncode == 2
    assert "this is rank 1 of several" in done.stderr
    assert "--tensor-parallel-size" in done.stderr


def adapted(path: Path) -> str:
    """The reply of one device with an adapter."""
    engine = tiny_engine(max_loras=1)
    engine.add_adapter("x", read_adapter(path), "x")
    params = SamplingParams(temperature=0.0, max_tokens=12)
    prompt = engine.tokenizer.encode("hello world")
    engine.add_request("0", EngineRequest(prompt, params, continues_text=True, adapter="x"))
    return "".join(event.text for events in run(engine).values() for event in events)


@pytest.mark.long
def test_adapters_of_requests(store: Path, tmp_path: Path) -> None:
    """One is loaded with its base, another while the server runs; one that does not fit is not."""
    shapes = linears(tiny_model())
    one, two = (
        write_peft(tmp_path / "adapters" / name, shapes, size=0.3, seed=seed)
        for seed, name in enumerate(("one", "two"))
    )
    write_peft(tmp_path / "adapters" / "wrong", {"model.layers.0.self_attn.q_proj": (64, 32)})
    options = ("--tensor-parallel-size", "2", "--adapter", f"one={one}")
    options += ("--allow-adapter-loading", "--adapter-directory", str(tmp_path / "adapters"))
    with serving(store, tmp_path / "errors", "ai/tiny", *options) as server:
        server.wait_until_ready()

        def text(model: str) -> str:
            reply = server.complete(model=model, temperature=0)
            assert reply.status_code == 200, reply.text
            return reply.json()["choices"][0]["text"]  # type: ignore[no-any-return]

        def load(name: str) -> httpx.Response:
            body = {"lora_name": name, "lora_path": str(tmp_path / "adapters" / name)}
            return httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=60)

        assert text("one") == adapted(one)
        assert load("two").status_code == 200
        wrong = load("wrong")
        assert wrong.status_code == 400, wrong.text
        assert text("two") == adapted(two)
        assert text("ai/tiny") == expected(temperature=0.0)
        assert len({text(name) for name in ("one", "two", "ai/tiny")}) == 3
        body = {"lora_name": "two"}
        unloaded = httpx.post(f"{server.url}/v1/unload_lora_adapter", json=body, timeout=60)
        assert unloaded.status_code == 200
        assert server.complete(model="two", temperature=0).status_code == 404
        assert text("one") == adapted(one)


@pytest.mark.long
def test_a_merged_adapter(store: Path, tmp_path: Path) -> None:
    """Each rank has its part of the base's weights with the adapter."""
    path = write_peft(tmp_path / "adapter", linears(tiny_model()), size=0.3)
    text = adapted(path)
    options = ("--tensor-parallel-size", "2", "--adapter", f"one={path}", "--merge")
    with serving(store, tmp_path / "errors", "ai/tiny", *options) as server:
        server.wait_until_ready()
        reply = server.complete(model="one", temperature=0)
        assert reply.json()["choices"][0]["text"] == text
        assert server.complete(temperature=0).status_code == 404
    assert text != expected(temperature=0.0)
