"""The zoo on this machine's GPU: every architecture against mlx-lm's path for a single request.

    python -m tests.engine.zoo.on_gpu [NAME ...]

Steps are compiled, and use kernels where there are any. Each model serves five requests that arrive
in different steps, with and without the prefix cache, and one after another, with their prompts in
one step or in several. Prints one line per model; exits with 1 if tokens differ although mlx-lm's
first choice was clear.

Matmuls of float32 are computed in float32, for mlx-lm as well: with TF32, which has ten bits, sums
in another order sometimes choose another expert or token. Set MLX_ENABLE_TF32=1 for MLX's default.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from modelpack_engine.core.buckets import FEW
from tests.engine.zoo.catalogue import CATALOGUE
from tests.engine.zoo.configuration import Configuration
from tests.engine.zoo.driving import Setting
from tests.engine.zoo.specimen import make_specimen

#: Smaller differences of log-probabilities can result from the order of sums on a GPU.
CLEAR = 1e-3
SETTINGS = {
    "batch": Setting(exact=False, buckets=FEW, rows=256),
    "without prefixes": Setting(exact=False, buckets=FEW, rows=256, prefix_cache=False),
    "alone": Setting(exact=False, buckets=FEW, rows=256, max_num_seqs=1, prefix_cache=False),
    # The first steps of a prompt that comes in several sample no token.
    "in chunks": Setting(exact=False, buckets=FEW, max_num_seqs=1, prefix_cache=False),
}


def check(configuration: Configuration) -> bool:
    """Run one architecture; print the result, and return whether it is correct."""
    start = time.perf_counter()
    specimen = make_specimen(configuration)
    wanted = specimen.reference.tokens
    runner = specimen.make_runner(exact=False, buckets=FEW)
    try:
        found = {name: specimen.drive(how, runner).tokens for name, how in SETTINGS.items()}
        wrong = {
            name: sum(one != other for one, other in zip(tokens, wanted, strict=True))
            for name, tokens in found.items()
        }
        fused = runner.fused
    finally:
        runner.undo()
    equal = not any(wrong.values())
    right = equal or specimen.reference.gap < CLEAR
    verdict = "equal" if equal else ("WRONG" if not right else "differs, as it may")
    details = [] if equal else [f"{count} of {len(wanted)} {name}" for name, count in wrong.items()]
    details += [] if equal else [f"mlx-lm's closest choice was {specimen.reference.gap:.1e}"]
    details += [f"{kind} x{count}" for kind, count in fused.items()]
    seconds = time.perf_counter() - start
    print(f"{configuration.id}: {verdict}", *details, *runner.notes, f"{seconds:.1f} s", sep="; ")
    return right


def main(names: Sequence[str]) -> int:
    """Check the architectures of these names, or all; return the exit status."""
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # MLX reads it at its first matmul
    known = {configuration.id: configuration for configuration in CATALOGUE}
    if unknown := set(names) - set(known):
        print("not in the zoo:", *sorted(unknown), file=sys.stderr)
        return 2
    verdicts = [check(known[name]) for name in names or known]
    print(f"{sum(verdicts)} of {len(verdicts)} architectures are right")
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
