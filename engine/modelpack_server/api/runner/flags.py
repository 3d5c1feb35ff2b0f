"""Runtime flags of llama.cpp and vLLM that say how those programs run, and mean nothing here.

Compose files pass them; refusing them would refuse models that run as well without. What changes
an answer is never among them.
"""

from __future__ import annotations

from collections.abc import Iterable

# How they log, which processors and libraries they use, which pages of their own they serve.
_ALONE = frozenset(
    ("--verbose", "-v", "--log-verbose", "--log-disable", "--log-prefix", "--log-timestamps",
     "--jinja", "--metrics", "--no-webui", "--slots", "--no-slots", "--mlock", "--no-mmap",
     "--cont-batching", "-cb", "--no-warmup", "--enforce-eager", "--disable-log-requests")
)  # fmt: skip
_WITH_VALUE = frozenset(
    ("--verbosity", "--log-verbosity", "-lv", "--log-file", "--log-colors", "--threads", "-t",
     "--threads-batch", "-tb", "--n-gpu-layers", "--gpu-layers", "-ngl", "--flash-attn", "-fa",
     "--ubatch-size", "-ub", "--tensor-parallel-size", "-tp")
)  # fmt: skip


def without_effect(flags: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the flags that mean something here, and those that do not; values go with theirs."""
    kept: list[str] = []
    dropped: list[str] = []
    takes_value = False
    for word in flags:
        if takes_value and not word.startswith("-"):
            dropped.append(word)
            takes_value = False
            continue
        name, equals, _ = word.partition("=")
        takes_value = name in _WITH_VALUE and not equals
        (dropped if name in _ALONE | _WITH_VALUE else kept).append(word)
    return kept, dropped
