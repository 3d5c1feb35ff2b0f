"""What the commands that run a model have in common: options, and the extra they need."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from modelpack.errors import UsageError

if TYPE_CHECKING:
    from modelpack_engine.config import EngineConfig

F = TypeVar("F", bound=Callable[..., Any])


def require_engine() -> None:
    """Raise `UsageError` unless the engine's extra is installed."""
    for module in ("mlx", "mlx_lm", "fastapi"):
        if importlib.util.find_spec(module) is None:
            raise UsageError(
                f"running a model needs {module}, which is not installed",
                hint="pip install 'modelpack[engine]'",
            )


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return bytes of a size like 24GiB, 8G (1000s) or a bare number; raises `UsageError`."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"{text!r} is no size", hint="like 24GiB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower() or " "))


def engine_options(command: F) -> F:
    """Add the options of an engine; the command gets them as `config`, a function that makes it."""

    @click.option(
        "--device",
        type=click.Choice(["auto", "gpu", "cpu"]),
        default="auto",
        show_default=True,
        help="Where to compute.",
    )
    @click.option("--max-model-len", type=click.IntRange(min=2), help="Longest context, in tokens.")
    @click.option(
        "--max-num-seqs",
        type=click.IntRange(min=1),
        default=64,
        show_default=True,
        help="Requests computed at a time.",
    )
    @click.option(
        "--max-num-batched-tokens", type=click.IntRange(min=1), help="Tokens of one step."
    )
    @click.option(
        "--gpu-memory-utilization",
        type=click.FloatRange(0, 1, min_open=True),
        default=0.9,
        show_default=True,
        help="Share of the GPU's memory to use.",
    )
    @click.option("--kv-cache-bytes", type=click.IntRange(min=1), help="Size of the KV cache.")
    @click.option("--no-prefix-caching", is_flag=True, help="Compute every prompt anew.")
    @functools.wraps(command)
    def wrapped(*args: Any, no_prefix_caching: bool, **arguments: Any) -> Any:
        require_engine()
        names = ("device", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
                 "gpu_memory_utilization", "kv_cache_bytes")  # fmt: skip
        given = {name: arguments.pop(name) for name in names}

        def config() -> EngineConfig:
            from modelpack_engine.config import EngineConfig

            return EngineConfig(**given, enable_prefix_caching=not no_prefix_caching)

        return command(*args, config=config, **arguments)

    return wrapped  # type: ignore[return-value]
