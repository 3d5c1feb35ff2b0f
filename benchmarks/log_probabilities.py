"""Compare log-probabilities in bfloat16 with float32: of the engine, vLLM and mlx-lm.

    MODELPACK_VLLM_PYTHON=… python benchmarks/log_probabilities.py DIRECTORY [TEXT …] \\
        [--tokens 512] [--answer 64] [--eager]

DIRECTORY holds a model in bfloat16 as safetensors with tokenizer.json; each TEXT is a file, after
the texts of passages.py. A text is cut after `--tokens`, and all are one batch. float32 is mlx-lm's
model with the same weights. An engine without a Python that has it is left out. Prints a JSON
object for each engine, with two tables of errors in nats:

  prompts  of the log-probability of each next token of the texts, which are the same for all
  answers  of each token of the engine's own greedy answers: float32 reads the same tokens

`as_float32` is the share of positions whose most likely token is also float32's. For random
weights of an 8B model's shape on a GPU, where it was not run yet (the variable may name a script
that sets vLLM's environment and runs its Python):

    python benchmarks/random_model.py /tmp/8b --shape llama-8b --layers 4 &&
        MODELPACK_VLLM_PYTHON=… python benchmarks/log_probabilities.py /tmp/8b
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

# Only the standard library above: each engine's own Python runs this file.

#: What an engine gives for a text: `tokens`, the text's and the answer's, and of each but the first
#: the log-probability (`logprobs`) and which token is the most likely there (`likely`).
Scored = dict[str, list[Any]]
Job = dict[str, Any]
KV_BYTES = 1 << 30


def modelpack(job: Job) -> tuple[str, list[Scored]]:
    """Score by our engine, as `modelpack serve` runs the model."""
    from modelpack import __version__
    from modelpack_engine import Engine, EngineConfig, SamplingParams
    from modelpack_engine.models import ModelFiles, load
    from modelpack_engine.models.loader import runs_packed
    from modelpack_engine.platform.device import choose_device

    config = EngineConfig(kv_cache_bytes=KV_BYTES, max_model_len=job["model_len"])
    files, device = ModelFiles.from_directory(Path(job["model"])), choose_device(config)
    loaded = load(files, device=device, packed=runs_packed(files, config, device))
    params = SamplingParams(
        max_tokens=job["answer"], temperature=0, ignore_eos=True, logprobs=1, prompt_logprobs=1
    )
    found = []
    for prompt, events in zip(
        job["prompts"], Engine(loaded, config).generate(job["prompts"], params), strict=True
    ):
        entries = [each for event in events for each in event.prompt_logprobs or () if each]
        entries += [each for event in events for each in event.logprobs or ()]
        found.append({
            "tokens": prompt + [token for event in events for token in event.token_ids],
            "logprobs": [entry.logprob for entry in entries],
            "likely": [entry.top[0][0] for entry in entries],
        })  # fmt: skip
    return f"modelpack {__version__}", found


def vllm(job: Job) -> tuple[str, list[Scored]]:
    """Score by vLLM in this process, without its tokenizer."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    import torch
    import vllm as package
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        job["model"],
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=job["model_len"],
        enable_prefix_caching=False,
        kv_cache_memory_bytes=KV_BYTES,
        enforce_eager=job["eager"],
    )
    params = SamplingParams(
        temperature=0, max_tokens=job["answer"], ignore_eos=True, detokenize=False,
        logprobs=1, prompt_logprobs=1,
    )  # fmt: skip
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in job["prompts"]]
    found = []
    for prompt, result in zip(
        job["prompts"], llm.generate(prompts, params, use_tqdm=False), strict=True
    ):
        [answer] = result.outputs
        tokens = [*prompt, *answer.token_ids]
        entries = [*result.prompt_logprobs[1:], *answer.logprobs]
        found.append({
            "tokens": tokens,
            "logprobs": [e[token].logprob for e, token in zip(entries, tokens[1:], strict=True)],
            "likely": [list(entry)[-1] for entry in entries],  # after the token itself, if another
        })  # fmt: skip
    return f"vllm {package.__version__}, torch {torch.__version__}", found


def mlx_lm(job: Job, dtype: str = "bfloat16") -> tuple[str, list[Scored]]:
    """Score by mlx-lm's model, text by text; log-probabilities in float32."""
    from modelpack_engine.platform import blas

    blas.prepare()  # before MLX: its own is slow
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm import __version__
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(job["model"]))
    model.update(tree_map(lambda array: array.astype(getattr(mx, dtype)), model.parameters()))

    def scored(prompt: list[int]) -> Scored:
        cache, tokens, rows = make_prompt_cache(model), list(prompt), prompt
        logprobs, likely = list[float](), list[int]()
        for _ in range(max(1, job["answer"])):
            logits = model(mx.array([rows]), cache)[0].astype(mx.float32)
            best: Any = mx.argmax(logits, axis=-1).tolist()
            if job["answer"]:
                tokens.append(best[-1])
            ids = mx.array(tokens[len(likely) + 1 :])[:, None]
            logits = logits[: len(ids)]
            total = mx.logsumexp(logits, axis=-1, keepdims=True)
            chosen: Any = mx.take_along_axis(logits, ids, axis=-1) - total
            logprobs += chosen[:, 0].tolist()
            likely += best[: len(ids)]
            rows = tokens[-1:]
        return {"tokens": tokens, "logprobs": logprobs, "likely": likely}

    about = f"mlx-lm {__version__}, mlx {mx.__version__}, {mx.device_info()['device_name']}"  # type: ignore[attr-defined]
    return about, [scored(prompt) for prompt in job["prompts"]]


def float32(job: Job) -> tuple[str, list[Scored]]:
    """Score the tokens of `prompts` by mlx-lm's model in float32."""
    os.environ["MLX_ENABLE_TF32"] = "0"  # matmuls keep all bits of float32 on a GPU, too
    return mlx_lm(job, "float32")


ENGINES: dict[str, Callable[[Job], tuple[str, list[Scored]]]] = {
    "modelpack": modelpack, "vllm": vllm, "mlx-lm": mlx_lm, "float32": float32,
}  # fmt: skip


def run(engine: str, python: str, job: Job) -> tuple[str, list[Scored]]:
    """Return the versions and what `engine` gives, from a process of its own."""
    with tempfile.NamedTemporaryFile("w+") as given, tempfile.NamedTemporaryFile("r") as results:
        json.dump(job, given)
        given.flush()
        # Elsewhere, and -P: modules of this directory have names of packages that vLLM looks for.
        command = [python, "-P", __file__, "--run", engine, given.name, results.name]
        done = subprocess.run(
            command, cwd=tempfile.gettempdir(), capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            sys.exit(f"{engine} failed: exit code {done.returncode}\n{done.stderr[-5000:]}")
        about, found = json.load(results)
    return about, found


def run_here(engine: str, given: str, results: str) -> NoReturn:
    about, found = ENGINES[engine](json.loads(Path(given).read_text()))
    Path(results).write_text(json.dumps((about, found)))
    os._exit(0)  # a library that fails at its end has nothing to do with the figures


def errors(pairs: Iterable[tuple[Scored, Scored]], part: Callable[[Scored], slice]) -> Job:
    """Return the errors of each pair's first against its second, at the positions of `part`."""
    found, same = list[float](), list[bool]()
    for ours, right in pairs:
        assert ours["tokens"] == right["tokens"]
        at = part(ours)
        values = zip(ours["logprobs"][at], right["logprobs"][at], strict=True)
        found += [abs(value - wanted) for value, wanted in values]
        same += map(int.__eq__, ours["likely"][at], right["likely"][at])
    return {
        "positions": len(found),
        "mean_error": round(statistics.fmean(found), 5),
        "greatest_error": round(max(found), 4),
        "as_float32": round(statistics.fmean(same), 4),
    }


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        run_here(*sys.argv[2:])
    from passages import PASSAGES
    from tokenizers import Tokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="DIRECTORY")
    parser.add_argument("texts", type=Path, nargs="*", metavar="TEXT")
    parser.add_argument("--tokens", type=int, default=512, help="the most of each text")
    parser.add_argument(
        "--answer", type=int, default=64, help="the tokens of each answer, at least 1"
    )
    parser.add_argument("--eager", action="store_true", help="do not let vLLM compile")
    given = parser.parse_args()
    texts = [*PASSAGES.values(), *(path.read_text() for path in given.texts)]
    tokenizer = Tokenizer.from_file(str(given.model / "tokenizer.json"))
    job = {
        "model": str(given.model.resolve()),
        "prompts": [tokenizer.encode(text).ids[: given.tokens] for text in texts],
        "answer": given.answer,
        "model_len": given.tokens + given.answer,
        "eager": given.eager,
    }
    pythons = {"modelpack": sys.executable, "mlx-lm": sys.executable}
    if python := os.environ.get("MODELPACK_VLLM_PYTHON"):
        pythons["vllm"] = python
    for engine, python in pythons.items():
        versions, found = run(engine, python, job)
        read = {**job, "prompts": [scored["tokens"] for scored in found], "answer": 0}
        reference, right = run("float32", sys.executable, read)
        pairs = list(zip(found, right, strict=True))
        tables = {
            "prompts": errors(pairs, lambda scored: slice(-given.answer)),
            "answers": errors(pairs, lambda scored: slice(-given.answer, None)),
        }
        about = {
            "versions": versions,
            "reference": reference,
            "machine": f"{os.cpu_count()} processors, {platform.platform()}",
        }
        print(json.dumps({"engine": engine, **tables, **about}), flush=True)


if __name__ == "__main__":
    main()
