"""One measurement of cpu.py: load a model into one engine, and print its figures as JSON.

    PYTHON cpu_engines.py {modelpack,llama.cpp,vllm} MODEL '{"kv_tokens": …, …}'

It runs in the Python of each engine, so it needs only that engine and numpy. All engines choose the
most likely token, hold as many tokens of keys and values in 16 bits, and run on all processors.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

Tokens = list[list[int]]
Job = dict[str, Any]
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Generator(Protocol):
    """A loaded model."""

    def generate(self, prompts: Tokens, count: int) -> Tokens:
        """Return `count` tokens after each prompt, all prompts at once."""


def modelpack(job: Job) -> Callable[[str], Generator]:
    """Return our engine."""
    from modelpack_engine import EngineConfig, SamplingParams
    from modelpack_engine.engine import Engine
    from modelpack_engine.models import ModelFiles, load
    from modelpack_engine.models.loader import runs_packed

    class Modelpack:
        def __init__(self, path: str) -> None:
            config = EngineConfig(
                device="cpu",
                max_num_seqs=job["streams"],
                max_model_len=job["model_len"],
                kv_cache_bytes=job["kv_bytes"],
                enable_prefix_caching=False,
            )
            files = ModelFiles.from_directory(Path(path))
            if not runs_packed(files, config, "cpu"):
                raise SystemExit("the library for CPUs was not built")
            self.engine = Engine(load(files, device="cpu", packed=True), config)

        def generate(self, prompts: Tokens, count: int) -> Tokens:
            params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
            answers = self.engine.generate(prompts, params)
            return [[token for event in events for token in event.token_ids] for events in answers]

    return Modelpack


def llama_cpp(job: Job) -> Callable[[str], Generator]:
    """Return llama.cpp by its C interface: one batch for all prompts, then one for each token."""
    import llama_cpp as lib
    import numpy as np

    silent = lib.llama_log_callback(lambda _level, _text, _data: None)
    lib.llama_log_set(silent, ctypes.c_void_p(0))
    lib.llama_backend_init()

    class LlamaCpp:
        def __init__(self, path: str) -> None:
            self.silent = silent  # llama.cpp keeps only its address
            self.model = lib.llama_model_load_from_file(
                path.encode(), lib.llama_model_default_params()
            )
            params = lib.llama_context_default_params()
            params.n_ctx, params.n_seq_max = job["kv_tokens"], job["streams"]
            params.n_batch, params.kv_unified = 1024, job["kv_unified"]
            params.n_threads = params.n_threads_batch = THREADS
            self.context = lib.llama_init_from_model(self.model, params)
            self.memory = lib.llama_get_memory(self.context)
            self.size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
            self.batch = lib.llama_batch_init(1024, 0, 1)

        def generate(self, prompts: Tokens, count: int) -> Tokens:
            lib.llama_memory_clear(self.memory, False)
            newest = self._decode(prompts, 0)
            found = [[token] for token in newest]
            for position in range(len(prompts[0]), len(prompts[0]) + count - 1):
                newest = self._decode([[token] for token in newest], position)
                for tokens, token in zip(found, newest, strict=True):
                    tokens.append(token)
            return found

        def _decode(self, rows: Tokens, position: int) -> list[int]:
            at, batch = 0, self.batch
            for sequence, tokens in enumerate(rows):
                for place, token in enumerate(tokens):
                    batch.token[at], batch.pos[at] = token, position + place
                    batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                    batch.logits[at] = place == len(tokens) - 1
                    at += 1
            batch.n_tokens = at
            code = lib.llama_decode(self.context, batch)
            if code != 0:
                raise SystemExit(f"llama_decode failed: {code}")
            pointer = lib.llama_get_logits(self.context)
            logits = np.ctypeslib.as_array(pointer, (len(rows), self.size))
            newest: list[int] = logits.argmax(axis=-1).tolist()
            return newest

    return LlamaCpp


def vllm(job: Job) -> Callable[[str], Generator]:
    """Return vLLM in this process, without a tokenizer."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams, TokensPrompt

    class VLLM:
        def __init__(self, path: str) -> None:
            self.llm = LLM(
                path,
                dtype="bfloat16",
                skip_tokenizer_init=True,
                max_model_len=job["model_len"],
                max_num_seqs=job["streams"],
                enable_prefix_caching=False,
                kv_cache_memory_bytes=job["kv_bytes"],
                enforce_eager=job["eager"],
            )

        def generate(self, prompts: Tokens, count: int) -> Tokens:
            params = SamplingParams(
                temperature=0, max_tokens=count, ignore_eos=True, detokenize=False
            )
            inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
            answers = self.llm.generate(inputs, params, use_tqdm=False)
            return [list(answer.outputs[0].token_ids) for answer in answers]

    return VLLM


ENGINES = {"modelpack": modelpack, "llama.cpp": llama_cpp, "vllm": vllm}


def random_prompts(seed: int, count: int, length: int) -> Tokens:
    """Return prompts of random tokens."""
    generator = random.Random(seed)
    return [[generator.randrange(1000, 40000) for _ in range(length)] for _ in range(count)]


def timed(engine: Generator, prompts: Tokens, count: int) -> float:
    """Return the seconds until all prompts have `count` tokens."""
    start = time.perf_counter()
    answers = engine.generate(prompts, count)
    elapsed = time.perf_counter() - start
    assert [len(tokens) for tokens in answers] == [count] * len(prompts)
    return elapsed


def measure(make: Callable[[str], Generator], path: str, job: Job) -> dict[str, float]:
    """Return the figures of one process; medians of `repeats`."""
    prompt, answer, streams = job["prompt"], job["answer"], job["streams"]
    start = time.perf_counter()
    engine = make(path)
    timed(engine, random_prompts(0, 1, prompt), 1)
    load = time.perf_counter() - start
    timed(engine, random_prompts(1, streams, prompt), 4)
    timed(engine, random_prompts(2, 1, job["long_prompt"]), 1)
    one, many, first = [], [], []
    for seed in range(10, 10 + job["repeats"]):
        one.append(answer / timed(engine, random_prompts(seed, 1, prompt), answer))
        prompts = random_prompts(seed, streams, prompt)
        many.append(streams * answer / timed(engine, prompts, answer))
        first.append(timed(engine, random_prompts(seed, 1, job["long_prompt"]), 1))
    figures = {"one stream": one, "streams": many, "first token": first}
    return {
        "load": load,
        "peak": _peak_bytes(),
        **{name: statistics.median(values) for name, values in figures.items()},
    }


def _peak_bytes() -> int:
    """Return the largest resident memory of this process."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(arguments: Sequence[str]) -> None:
    name, path, text = arguments
    job = json.loads(text)
    figures = measure(ENGINES[name](job), path, job)
    print(json.dumps(figures), flush=True)
    os._exit(0)  # a library that fails at its end has nothing to do with the figures


if __name__ == "__main__":
    main(sys.argv[1:])
