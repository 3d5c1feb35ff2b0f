"""Compare first tokens in bfloat16 with those in float32 on a GPU, for our engine and mlx-lm.

    MLX_ENABLE_TF32=0 python benchmarks/first_tokens.py NAME [--prompts 24] [--longest 160]

Models of random weights, as in `gpu_architectures.py`, are compared with themselves in float32: the
number of equal first tokens, and the mean difference of log-probabilities of the 20 tokens that are
most likely in our engine. If mlx-lm differs from float32 as much as our engine differs from mlx-lm,
rounding decides the tokens, and equal tokens mean little. Prints a JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from typing import Any

import mlx.core as mx
from gpu_architectures import VOCABULARY, cast, make_engine, make_model

from modelpack_engine.engine import Engine
from modelpack_engine.outputs import TokenLogprob
from modelpack_engine.request import SamplingParams

PARAMS = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, logprobs=20)


def logprobs_alone(model: Any, prompts: list[list[int]]) -> list[mx.array]:
    """Return log-probabilities float32 [vocabulary] after each prompt, by a plain forward pass."""
    found = []
    for token_ids in prompts:
        logits = model(mx.array([token_ids]))[0, -1].astype(mx.float32)
        found.append(logits - mx.logsumexp(logits))
        mx.eval(found[-1])
    return found


def ours(engine: Engine, prompts: list[list[int]]) -> list[TokenLogprob]:
    """Return the token after each prompt, with all prompts in one batch."""
    found: list[TokenLogprob] = []
    for [event] in engine.generate(prompts, PARAMS):
        assert event.logprobs is not None
        found.append(event.logprobs[0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--longest", type=int, default=160)
    args = parser.parse_args()
    model = make_model(args.name)
    draw = random.Random(3)
    prompts = [
        [draw.randrange(100, VOCABULARY) for _ in range(draw.randint(64, args.longest))]
        for _ in range(args.prompts)
    ]
    theirs = logprobs_alone(model, prompts)
    parameters = model.parameters()
    model.update(cast(parameters, mx.float32))
    wanted = logprobs_alone(model, prompts)
    model.update(parameters)
    found = ours(make_engine(model, args.name), prompts)
    best = [int(mx.argmax(logprobs)) for logprobs in wanted]
    of_theirs = [int(mx.argmax(logprobs)) for logprobs in theirs]
    of_ours = [token.token_id for token in found]
    errors: dict[str, list[float]] = {"ours": [], "mlx-lm": []}
    for token, right, other in zip(found, wanted, theirs, strict=True):
        for token_id, logprob in token.top:
            errors["ours"].append(abs(logprob - float(right[token_id])))
            errors["mlx-lm"].append(abs(float(other[token_id]) - float(right[token_id])))
    result = {
        "architecture": args.name,
        "prompts": len(prompts),
        "ours_as_float32": sum(map(int.__eq__, of_ours, best)),
        "mlx-lm_as_float32": sum(map(int.__eq__, of_theirs, best)),
        "ours_as_mlx-lm": sum(map(int.__eq__, of_ours, of_theirs)),
        "mean_error": {name: round(statistics.mean(each), 4) for name, each in errors.items()},
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
