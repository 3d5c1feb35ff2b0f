"""Show which kernels the steps of the engine run on a GPU, and for how long.

    python benchmarks/gpu_steps.py [--shape qwen3-30b-a3b] [--bits 16] decode:1:128 prefill:32:1000
    python benchmarks/gpu_steps.py --gguf q4_k_m decode:1:128

`decode:N:LENGTH` are 40 steps of N requests after prompts of that length, and `prefill:N:LENGTH`
all steps of N prompts. The times come from NVIDIA's CUPTI through PyTorch's profiler, so PyTorch
for CUDA must be installed. Profiling slows the host down; times "without" are taken before. A
kernel that is launched early waits for the one before: its time counts from the end of that one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_blocks
import gpu_engine
import mlx.core as mx
import torch
from torch.profiler import ProfilerActivity, profile

from modelpack_engine.engine import Engine
from modelpack_engine.models.precision import evaluate
from modelpack_engine.request import EngineRequest, SamplingParams

DECODE_STEPS = 40


def add(engine: Engine, name: str, count: int, length: int, tokens: int, seed: int) -> None:
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    for index in range(count):
        prompt = gpu_engine.prompt(length, seed + index)
        engine.add_request(f"{name}-{index}", EngineRequest(prompt, params))


def drain(engine: Engine) -> int:
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
    return steps


def decode(engine: Engine, count: int, length: int) -> Callable[[], int]:
    """Return a call of some decode steps, after the prompts."""
    add(engine, f"decode-{time.time()}", count, length, 400, seed=count)
    for _ in range(20 + count * length // 512):
        engine.step()

    def run() -> int:
        for _ in range(DECODE_STEPS):
            engine.step()
        return DECODE_STEPS

    return run


def prefill(engine: Engine, count: int, length: int) -> Callable[[], int]:
    """Return a call of all steps of some prompts, which differ at each call."""
    seed = 1000

    def run() -> int:
        nonlocal seed
        seed += count
        add(engine, f"prefill-{seed}", count, length, 1, seed)
        return drain(engine)

    run()  # shapes
    return run


def show(name: str, run: Callable[[], int], most: int = 24) -> None:
    """Print the time of a call without the profiler, and the kernels of another with it."""
    mx.synchronize()
    start = time.perf_counter()
    steps = run()
    mx.synchronize()
    seconds = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        steps = run()
        mx.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    events = [
        event for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]  # fmt: skip
    before = 0.0
    for event in sorted(events, key=lambda event: event.time_range.end):
        end = event.time_range.end
        times[event.name].append(end - max(before, event.time_range.start))
        before = end
    busy = sum(map(sum, times.values())) / steps
    kernels = sum(map(len, times.values())) / steps
    print(
        f"{name}: {steps} steps of {seconds / steps * 1e3:.3f} ms without the profiler; "
        f"GPU {busy / 1e3:.3f} ms, {kernels:.0f} kernels a step"
    )
    for kernel, found in sorted(times.items(), key=lambda item: -sum(item[1]))[:most]:
        each = sum(found) / len(found)
        total, count = sum(found) / steps, len(found) / steps
        print(f"  {total:9.1f} us a step  {count:6.1f} x {each:8.1f} us  {kernel[:110]}")


def model_of_gguf(mix: str) -> Any:
    """Return a model of random blocks, as `gguf_blocks.py` writes and loads it."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "model.gguf")
        gguf_blocks.write_gguf(path, gguf_blocks.MIXES[mix])
        model = gguf_blocks.load_gguf(path, "some")
        evaluate(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-1b", choices=gpu_engine.SHAPES)
    parser.add_argument("--bits", type=int, default=16, choices=(4, 8, 16))
    parser.add_argument("--group-size", type=int, default=64, help="of quantised weights")
    parser.add_argument("--gguf", choices=gguf_blocks.MIXES, help="of 8B, in place of a shape")
    parser.add_argument("--kv-gib", type=float, default=16)
    parser.add_argument("windows", nargs="+", metavar="KIND:COUNT:LENGTH")
    args = parser.parse_args()
    if args.gguf:
        model = model_of_gguf(args.gguf)
    else:
        model = gpu_engine.make_model(args.shape, args.bits, args.group_size)
    engine = gpu_engine.make_engine(model, 128, "shortest-first", int(args.kv_gib * 2**30))
    name = args.gguf or f"{args.shape}, {args.bits} bits"
    print(f"{name}, {mx.device_info()['device_name']}", flush=True)
    for window in args.windows:
        kind, count, length = window.split(":")
        make = {"decode": decode, "prefill": prefill}[kind]
        show(window, make(engine, int(count), int(length)))
        drain(engine)


if __name__ == "__main__":
    main()
