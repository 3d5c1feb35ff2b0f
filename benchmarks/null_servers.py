"""Servers whose models take no time: every stream gets the same tokens at the same times.

    null_servers.py ours|protected|process STREAMS TOKENS TICK_MS [COMPUTE_MS CALLS]
    null_servers.py mlx-lm|mlx-lm-front|vllm-mlx STREAMS TOKENS TICK_MS

Serves on a free port and prints it. After STREAMS requests have arrived, each of them gets a token
every TICK_MS, TOKENS times. Then prints the processor time of the process for each token in
microseconds, measured from before the first token to half a second after the last.

Scheduling and computation are replaced; everything that turns token ids into bytes on sockets is
not. `ours` is the application of `modelpack serve` with its `AsyncEngine`, detokenizer and metrics,
and an `Engine` that only waits; `protected` adds the gateway checks, which `modelpack serve` always
has; `process` is `protected` with the engine in a process of its own, and prints no time. With
COMPUTE_MS, a step computes in Python for so long, as a host does, with CALLS pauses of 50 us
without the GIL, as in calls of MLX, and then waits for TICK_MS, as for a GPU.

`mlx-lm` is its server with its generation loop, detokenizer, queues and HTTP handler,
and a `BatchGenerator` that only waits. `mlx-lm-front` also replaces the generation loop: finished
texts are put into the server's queues. `vllm-mlx` is the application of that server with an engine
that reads finished texts from a queue for each stream, so its scheduler and detokenizer do not
count.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

#: The text of every token: neither markup of a model nor a character that needs escaping.
TOKEN = 256
PIECE = " word"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


class Pace:
    """The schedule of tokens, and the measured processor time."""

    def __init__(self, streams: int, tokens: int, pause: float) -> None:
        self.streams = streams
        self.tokens = tokens
        self._pause = pause
        self._began = self._due = 0.0
        self._given = 0

    def next(self, *, catches_up: bool = True) -> bool:
        """Return at the time of the next token; the result says whether it is the last one.

        A step that `catches_up` waits for less if those before took longer.
        """
        if self._given == 0:
            time.sleep(0.5)  # all responses have started
            self._began = time.process_time()
            self._due = time.monotonic()
        if not catches_up:
            self._due = time.monotonic() + self._pause
        time.sleep(max(0.0, self._due - time.monotonic()))
        self._due += self._pause
        self._given += 1
        if self._given == self.tokens:
            threading.Timer(0.5, self._tell).start()
        return self._given == self.tokens

    def _tell(self) -> None:
        taken = time.process_time() - self._began
        print(1e6 * taken / (self.streams * self.tokens), flush=True)


def write_tokenizer(directory: Path) -> Path:
    """Write a tokenizer of bytes and PIECE that all servers can load."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġword"]
    words = {text: number for number, text in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(words, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>",
              "chat_template": TEMPLATE}  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


class NullEngine:
    """An engine that waits for `pace` instead of computing; a Python loop stands for its host.

    The loop takes `compute` seconds of processor time before each step.
    """

    max_model_len = 4096
    vocab_size = 258
    memory_bytes = weight_bytes = kv_cache_bytes = 1
    runs_adapters = False
    model_type = ""
    vision, no_vision = None, ""

    def __init__(self, pace: Pace, directory: Path, compute: float, calls: int) -> None:
        from tokenizers import Tokenizer as Backend

        from modelpack_engine.config import EngineConfig
        from modelpack_engine.models import Tokenizer
        from modelpack_engine.models.chat_template import ChatTemplate
        from modelpack_engine.models.tokenizer import TokenText

        self.config = EngineConfig()
        backend = Backend.from_file(str(directory / "tokenizer.json"))
        self.tokenizer = Tokenizer(
            backend, text=TokenText.BYTE_LEVEL, eos_token_ids=[257],
            chat_template=ChatTemplate(TEMPLATE),
        )  # fmt: skip
        self._pace = pace
        self._compute = compute
        self._calls = calls
        self._choices: list[tuple[str, Any]] = []

    def add_request(self, request_id: str, request: Any) -> None:
        from modelpack_engine.core.detokenizer import Detokenizer

        self._choices.append((request_id, Detokenizer(self.tokenizer, request.params)))

    @property
    def has_work(self) -> bool:
        return len(self._choices) >= self._pace.streams

    def step(self) -> list[Any]:
        from modelpack_engine.outputs import FinishReason, RequestEvent, Timing, Usage

        for _ in range(self._calls + 1):
            computed = time.thread_time() + self._compute / (self._calls + 1)
            while time.thread_time() < computed:
                pass
            if self._calls:
                time.sleep(50e-6)
        end: dict[str, Any] = {}
        if self._pace.next(catches_up=not self._compute):
            timing = Timing(0.0, 0.0, 0.0, time.monotonic())
            usage = Usage(5, self._pace.tokens)
            end = {"finish_reason": FinishReason.LENGTH, "usage": usage, "timing": timing}
        events = [
            RequestEvent(name, 0, (TOKEN,), detokenizer.push([TOKEN]).text, **end)
            for name, detokenizer in self._choices
        ]
        if end:
            self._choices.clear()
        return events

    def abort(self, request_id: str, index: int | None = None) -> list[Any]:
        return []

    def fail_all(self, message: str) -> list[Any]:
        return []

    def stats(self) -> Any:
        from modelpack_engine.outputs import EngineStats

        return EngineStats()

    def close(self) -> None:
        pass


def serve_ours(kind: str, pace: Pace, directory: Path, compute: float, calls: int) -> None:
    from modelpack_engine.async_engine import AsyncEngine
    from modelpack_engine.core.metrics import Meter
    from modelpack_engine.process_engine import ProcessEngine
    from modelpack_server.api.app import ModelServer
    from modelpack_server.gateway.protection import Protection, protect
    from modelpack_server.pool.catalogue import LoadedEngine, StoredModel
    from modelpack_server.pool.pool import ModelPool

    class Catalogue:
        store: Any = None

        def version(self) -> object:
            return 1

        def find(self, name: str) -> StoredModel:
            return StoredModel("m", ("m",), size=1)

        def stored(self) -> list[StoredModel]:
            return [self.find("m")]

        def needs(self, model: StoredModel, settings: object) -> int:
            return 1

        def load(
            self, model: StoredModel, settings: object, meter: Meter, room: int | None
        ) -> LoadedEngine:
            client: Any = ProcessEngine if kind == "process" else AsyncEngine
            engine = client(partial(NullEngine, pace, directory, compute, calls), meter)
            engine.wait_until_ready(60)
            return LoadedEngine(engine)

    def wrap(app: Any) -> Any:
        return app if kind == "ours" else protect(app, Protection(report=lambda trace: None))

    with ModelServer(lambda: ModelPool(Catalogue()), address="127.0.0.1:0", wrap=wrap) as server:
        print(server.url.rpartition(":")[2], flush=True)
        sys.stdin.read()


def serve_mlx_lm(pace: Pace, directory: Path, *, front: bool) -> None:
    import mlx.core as mx
    from mlx_lm import server, tokenizer_utils
    from mlx_lm.generate import GenerationBatch

    class NullBatches:
        """Returns the results of `mlx_lm.generate.BatchGenerator` without computing anything."""

        prompt_cache_nbytes = 0

        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._uids: list[int] = []
            self._logprobs = mx.zeros(258)
            mx.eval(self._logprobs)

        def insert_segments(self, segments: Any, **options: Any) -> tuple[int]:
            self._uids.append(len(self._uids))
            return (self._uids[-1],)

        def next(self) -> tuple[list[Any], list[Any]]:
            if len(self._uids) < pace.streams:
                return [], []
            last = pace.next()
            responses = [
                GenerationBatch.Response(
                    uid, TOKEN, self._logprobs, "length" if last else None, [], [1, uid]
                )
                for uid in self._uids
            ]
            if last:
                self._uids.clear()
            return [], responses

        def extract_cache(self, uids: Any) -> dict[int, Any]:
            return {}

        def remove(self, uids: Any) -> None:
            pass

        def close(self) -> None:
            pass

    class FrontOnly(server.ResponseGenerator):  # type: ignore[misc]
        def _generate(self) -> None:
            queues = []
            while len(queues) < pace.streams:
                queue, _, _ = self.requests.get()
                machine = server.make_text_state_machine(tokenizer, [])
                queue.put(server.GenerationContext(False, False, None, machine, "normal", [1] * 5))
                queues.append(queue)
            last = False
            while not last:
                last = pace.next()
                for queue in queues:
                    queue.put(server.Response(PIECE, TOKEN, 0.0, "length" if last else None, ()))
            for queue in queues:
                queue.put(None)

    class Http(server.ThreadingHTTPServer):  # type: ignore[misc,name-defined]
        request_queue_size = 128  # with the default of 5, 64 clients wait for seconds to connect

        def server_activate(self) -> None:
            super().server_activate()
            print(self.server_address[1], flush=True)

    tokenizer = tokenizer_utils.load(directory)
    cli = Namespace(
        allowed_origins=["*"], max_tokens=1000, temp=0.0, top_p=1.0, top_k=0, min_p=0.0,
        num_draft_tokens=0, model="m", chat_template_args={}, decode_concurrency=pace.streams,
        prompt_concurrency=8, prefill_step_size=2048, prompt_cache_bytes=None, kv_bits=None,
    )  # fmt: skip
    provider = Namespace(
        cli_args=cli, load_default=lambda: None, load=lambda *names: (None, tokenizer),
        model_key=("m",), is_batchable=True, processor=None, reset=lambda: None,
    )  # fmt: skip
    server.BatchGenerator = NullBatches
    kind = FrontOnly if front else server.ResponseGenerator
    generator = kind(provider, server.LRUPromptCache(10))
    arguments = ("127.0.0.1", 0, generator, Http)
    threading.Thread(target=server._run_http_server, args=arguments, daemon=True).start()
    sys.stdin.read()


def serve_vllm_mlx(pace: Pace, directory: Path) -> None:
    import asyncio
    import socket

    import uvicorn
    from transformers import AutoTokenizer
    from vllm_mlx import server
    from vllm_mlx.engine.base import BaseEngine, GenerationOutput

    def never(*arguments: Any, **options: Any) -> Any:
        raise NotImplementedError

    async def nothing(*arguments: Any, **options: Any) -> None:
        pass

    class NullEngine(BaseEngine):  # type: ignore[misc]
        model_name = "m"
        is_mllm = False
        _loaded = True
        tokenizer = AutoTokenizer.from_pretrained(directory)
        generate = stream_generate = chat = never
        start = stop = nothing

        def __init__(self) -> None:
            self._queues: list[asyncio.Queue[Any]] = []

        async def stream_chat(self, messages: Any, **options: Any) -> Any:
            queue: asyncio.Queue[Any] = asyncio.Queue()
            self._queues.append(queue)
            if len(self._queues) == pace.streams:
                loop = asyncio.get_running_loop()
                threading.Thread(target=self._give, args=(loop,), daemon=True).start()
            finished = False
            while not finished:
                output = await queue.get()
                finished = output.finished
                yield output

        def _give(self, loop: asyncio.AbstractEventLoop) -> None:
            text = ""
            for count in range(1, pace.tokens + 1):
                last = pace.next()
                text += PIECE
                output = GenerationOutput(
                    text=text, new_text=PIECE, tokens=[TOKEN], prompt_tokens=5,
                    completion_tokens=count, finished=last,
                    finish_reason="length" if last else None,
                )  # fmt: skip
                loop.call_soon_threadsafe(self._put, output)

        def _put(self, output: Any) -> None:
            for queue in self._queues:
                queue.put_nowait(output)

    server._engine = NullEngine()
    server._model_name = "m"
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(listener.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(server.app, log_level="error")).run([listener])


def main() -> None:
    kind, streams, tokens, milliseconds, *compute = sys.argv[1:]
    pace = Pace(int(streams), int(tokens), float(milliseconds) / 1000)
    with tempfile.TemporaryDirectory() as scratch:
        directory = write_tokenizer(Path(scratch))
        if kind.startswith("mlx-lm"):
            serve_mlx_lm(pace, directory, front=kind == "mlx-lm-front")
        elif kind == "vllm-mlx":
            serve_vllm_mlx(pace, directory)
        else:
            milliseconds, calls = compute or ("0", "0")
            serve_ours(kind, pace, directory, float(milliseconds) / 1000, int(calls))


if __name__ == "__main__":
    import null_servers  # the engine's process finds its class in a module of this name

    null_servers.main()
