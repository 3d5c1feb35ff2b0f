"""docs/models.md: what architectures run, and how; `python -m tests.engine.zoo.table` writes it."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx_lm

from modelpack_engine.adaptation.layout import StateLayout
from modelpack_engine.attention.pools import KVLayout
from modelpack_engine.model_runner import ModelRunner
from tests.engine.zoo.catalogue import CATALOGUE
from tests.engine.zoo.configuration import Configuration
from tests.engine.zoo.excluded import EXCLUDED

PATH = Path(__file__).parents[3] / "docs" / "models.md"

HEAD = """\
# Models

Written by `python -m tests.engine.zoo.table`; a test holds it to the code.

Any text model of [mlx-lm](https://github.com/ml-explore/mlx-lm) runs, by mlx-lm's own classes. For
each architecture of mlx-lm {version}, a tiny model with random weights has to answer, token by
token, what mlx-lm answers for a single request: with prompts cut into chunks and mixed with
decoding, prefixes shared, sequences preempted, ends seen late, in a batch and alone
([tests/engine/zoo](../tests/engine/zoo)).

How a model runs is found when it is loaded, and tested on its real weights:

- **handles**: the classes as they are; every token of a step is a row, attention reads the pages;
- **patched**: the same, with a few lines of ours for what cannot be said in rows;
- **pieces**: some attention modules run sequence by sequence, on keys gathered from the pages;
- **contiguous**: one forward per request, with mlx-lm's own cache: correct, but slow.

Recurrent layers always run sequence by sequence in a prompt, and as one group when decoding.
Prefixes of these models are shared up to a snapshot of their state
([how](serving.md#how-it-works)).

| architecture | tier | prefixes shared | layers | |
|---|---|---|---|---|
"""

EXCLUDED_HEAD = """
Not held to mlx-lm:

| architecture | why |
|---|---|
"""


def row(configuration: Configuration, runner: ModelRunner) -> str:
    """Return the table's line for a loaded model."""
    shared = "yes" if runner.supports_prefix_cache else "no"
    cells = (configuration.id, runner.tier, shared, _layers(runner), "; ".join(runner.notes))
    return f"| {' | '.join(cells)} |\n"


def _layers(runner: ModelRunner) -> str:
    if runner.layout is None:
        return ""
    kinds: dict[str, None] = {}
    for leaf in runner.layout.leaves():
        if isinstance(leaf.content, KVLayout):
            layout = leaf.content
            heads = (layout.key_heads, layout.value_heads)
            latent = heads == (1, 1) and layout.key_dim != layout.value_dim
            window = layout.window is not None
            kinds["latent" if latent else "sliding window" if window else "full attention"] = None
        elif isinstance(leaf.content, StateLayout):
            kinds["recurrent"] = None
    return ", ".join(kinds)


def render(rows: list[str]) -> str:
    """Return the whole document."""
    excluded = "".join(f"| {name} | {why} |\n" for name, why in sorted(EXCLUDED.items()))
    return HEAD.format(version=mlx_lm.__version__) + "".join(rows) + EXCLUDED_HEAD + excluded


def main() -> None:
    mx.disable_compile()
    rows = []
    for configuration in CATALOGUE:
        rows.append(row(configuration, ModelRunner(configuration.build(), num_blocks=8)))
    PATH.write_text(render(rows))


if __name__ == "__main__":
    main()
