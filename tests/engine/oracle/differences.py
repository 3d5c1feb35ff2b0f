"""Models of the oracle that do not answer as transformers does, by its major version, and why.

Those of `LOAD_ERRORS` do not load. Those of `OTHER_ANSWERS` load and answer something else, each
because of transformers 4: transformers 5 answers as we do. docs/models.md lists both.
"""

from __future__ import annotations

LOAD_ERRORS: dict[tuple[str, str], str] = {
    ("4", "llama4_text"): "mlx-lm gives this name to another model",
    ("4", "minimax"): "mlx-lm's minimax is MiniMax-M2; MiniMax-Text-01 has other layers",
    ("4", "olmo"): "mlx-lm runs it with a package of its authors, ai2-olmo",
    ("5", "bailing_hybrid"): "config.json lacks fields that mlx-lm's class needs",
    ("5", "kimi_k25"): "transformers 5 names its tensors differently from mlx-lm",
    ("5", "kimi_linear"): "config.json lacks linear_attn_config, which mlx-lm reads",
    ("5", "llama4_text"): "mlx-lm gives this name to another model",
    ("5", "longcat_flash"): "transformers 5 saves weights for experts that compute nothing",
    ("5", "mimo_v2_flash"): "config.json lacks fields that mlx-lm's class needs",
    ("5", "minimax"): "mlx-lm's minimax is MiniMax-M2; MiniMax-Text-01 has other layers",
    ("5", "nanochat"): "transformers 5 names its tensors differently from mlx-lm",
    ("5", "olmo"): "mlx-lm runs it with a package of its authors, ai2-olmo",
    ("5", "olmo_hybrid"): "transformers 5 names its norms differently from mlx-lm",
}

OTHER_ANSWERS: dict[tuple[str, str], tuple[float, str]] = {
    ("4", "deepseek_v2"): (0.9585, "transformers 4 leaves mscale_all_dim out of yarn's attention"),
    ("4", "granitemoehybrid"): (
        0.2900,
        "transformers 4 normalises all mamba_n_groups at once; the same with one group",
    ),
    ("4", "mamba2"): (
        0.5999,
        "transformers 4 normalises all n_groups at once; the same with one group",
    ),
    ("4", "recurrent_gemma"): (
        0.9152,
        "transformers 4 has no window without a cache; the same within the window",
    ),
}

DIFFERENCES = {**LOAD_ERRORS, **{pair: why for pair, (_, why) in OTHER_ANSWERS.items()}}
