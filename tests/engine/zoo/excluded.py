"""Architectures of mlx-lm that are not compared with mlx-lm, and why."""

from __future__ import annotations

from tests.engine.zoo.configuration import Configuration
from tests.engine.zoo.dense import GPT

#: Modules of mlx_lm.models that are not models.
PARTS = {
    "activations",
    "base",
    "bitlinear_layers",
    "cache",
    "gated_delta",
    "mla",
    "pipeline",
    "rope_utils",
    "ssm",
    "switch_layers",
}

CUT = "mlx-lm's own answer depends on where it cuts a prompt"

EXCLUDED = {
    "bitnet": "computes with a Metal kernel, so it cannot be tested here",
    "muse_spark": "computes with Metal kernels, so it cannot be tested here",
    "olmo": "mlx-lm cannot run it: it adds the name of a mask to its scores",
    "phi3small": f"{CUT}: block-sparse masks are aligned with the end of a chunk",
    "prism_hadamard_qwen35": "takes only 2-bit checkpoints that are packed for it",
}

#: Its mask depends on the lengths of a chunk and of the context before it.
PHI3SMALL = Configuration(
    "phi3small",
    {
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 128,
        "gegelu_limit": 20.0,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": 100352,  # it writes to ids above 100,000 for any size
        "blocksparse_block_size": 32,
        "blocksparse_num_local_blocks": 1,
        "blocksparse_vert_stride": 2,
    },
)

OLMO = Configuration(
    "olmo",
    {
        **GPT,
        "d_model": 64,
        "n_layers": 4,
        "n_heads": 4,
        "mlp_hidden_size": 256,
        "embedding_size": 256,
        "weight_tying": True,
    },
)
