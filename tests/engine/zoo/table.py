"""docs/models.md, the table of architectures; `python -m tests.engine.zoo.table` writes it."""

from __future__ import annotations

import textwrap
from pathlib import Path

import mlx.core as mx
import mlx_lm

from modelpack_engine.attention.kv_pools import KVLayout
from modelpack_engine.runner.model_layout import StateLayout
from modelpack_engine.runner.model_runner import ModelRunner, make_runner
from tests.engine.oracle.answers import FIXTURES, fixture
from tests.engine.oracle.differences import DIFFERENCES, LOAD_ERRORS, OTHER_ANSWERS
from tests.engine.zoo.catalogue import CATALOGUE
from tests.engine.zoo.configuration import Configuration
from tests.engine.zoo.excluded import EXCLUDED

PATH = Path(__file__).parents[3] / "docs" / "models.md"

HEAD = """\
# Models

Written by `python -m tests.engine.zoo.table`; a test holds it to the code.

The engine runs any text model of [mlx-lm](https://github.com/ml-explore/mlx-lm) with mlx-lm's own
classes. For each architecture of mlx-lm {version}, a tiny model with random weights must generate
the same tokens as mlx-lm does for a single request: with chunked prompts mixed with decoding,
shared prefixes, preempted sequences, deferred stops, in a batch and alone
([tests/engine/zoo](../tests/engine/zoo)).

The tier of a model is selected at load, and tested on its real weights:

- **paged**: unmodified classes; every token of a step is a row, and attention reads the KV blocks;
- **patched**: the same, with a few lines of our own for operations that rows cannot express;
- **per-sequence**: some attention modules run once per sequence, on keys gathered from the blocks;
- **fallback**: one forward pass per request, with mlx-lm's own cache: correct, but slow.

Recurrent layers always run sequence by sequence in a prompt, and as one group when decoding.
Prefixes of these models are shared up to a snapshot of their state
([how](engine.md#prefix-caching)).

| architecture | tier | prefixes shared | layers | |
|---|---|---|---|---|
"""

EXCLUDED_HEAD = """
Not compared with mlx-lm:

| architecture | why |
|---|---|
"""

CONFIGURATIONS = """
## Configurations

config.json is read in the spellings of transformers 4 and 5: `rope_parameters` (for each type of
layer too) or `rope_theta` and `rope_scaling`, `dtype` or `torch_dtype`, fields inside
`text_config`. Two spellings that disagree are an error.

mlx-lm's classes drop unknown fields. A model is refused by the name of a field if its value changes
the output in transformers and mlx-lm's class ignores it, for example another activation than the
class has, or a rotation that it does not compute. `--ignore-config-field NAME` loads the model
anyway. Fields that transformers does not have, and values without effect, are accepted.

If the class lacks only the sliding window (Mistral 7B v0.1, Gemma 2, Phi 3, StarCoder2, Qwen
with `use_sliding_window`), the model runs with a context of at most the window, for which it is
correct, with a note. With yarn, the context is the original one times the factor, if that
is longer than `max_position_embeddings`. A note also says where longrope's factors for long
contexts are used for short ones (Phi 3).

Which fields these are is measured: transformers 4 and 5 saved a tiny model of each architecture and
answered with each field of its config changed in turn; our logits have to follow, or the model has
to be refused ([tests/engine/oracle](../tests/engine/oracle)). Configs of encoders (BERT and
its like) are read by classes of ours; an activation or a kind of position that they do not have is
an error too.
"""

AGREEMENT = """
## Agreement with transformers

{kinds} model types of transformers have to answer as transformers does: tiny random models that
{versions} saved, in float32, with a cosine of the logits of at least
0.9999 ([tests/engine/oracle](../tests/engine/oracle)). Where mlx-lm's class computes something
else, it is corrected when the model is loaded (ernie4_5_moe, glm, gpt_oss, granitemoehybrid, jamba,
mamba2, recurrent_gemma). Yarn, llama3 and linear rope scaling is also applied where mlx-lm's class
ignores it (Qwen 3 MoE, Mixtral, Gemma 2, GLM 4, StarCoder2 and others), for GGUF too.

{agreeing}

Those that do not agree, by the version that saved them:

| model type | transformers | what happens | why |
|---|---|---|---|
"""


def agreement() -> str:
    """Return the section about transformers' logits."""
    saved = {version: fixture(path) for version, path in FIXTURES.items()}
    pairs = [(version, kind) for version, file in saved.items() for kind in file["models"]]
    kinds = sorted({kind for version, kind in pairs if (version, kind) not in DIFFERENCES})
    rows = {(kind, version): ("does not load", why) for (version, kind), why in LOAD_ERRORS.items()}
    for (version, kind), (cosine, why) in OTHER_ANSWERS.items():
        rows[kind, version] = (f"cosine {cosine:.2f}", why)
    names = textwrap.fill(", ".join(kinds) + ".", 100, break_on_hyphens=False)
    return AGREEMENT.format(
        kinds=len(kinds),
        versions=" and ".join(f"transformers {file['transformers']}" for file in saved.values()),
        agreeing=names,
    ) + "".join(
        f"| {kind} | {saved[version]['transformers']} | {what} | {why} |\n"
        for (kind, version), (what, why) in sorted(rows.items())
    )


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
    head = HEAD.format(version=mlx_lm.__version__)
    return head + "".join(rows) + EXCLUDED_HEAD + excluded + CONFIGURATIONS + agreement()


def main() -> None:
    mx.disable_compile()
    rows = []
    for configuration in CATALOGUE:
        rows.append(row(configuration, make_runner(configuration.build(), num_blocks=8)))
    PATH.write_text(render(rows))


if __name__ == "__main__":
    main()
