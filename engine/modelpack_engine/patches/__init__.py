"""Everything that the engine changes in MLX and mlx-lm at run time.

    functions       functions replaced in the process; `install` and `uninstall`
    modules         calls of single modules of a model, by their class; `ClassSwaps.undo`
    lora            LoRA adapters on the layers of a model, for each row of a step
    fused_layers    decoder layers and mixtures of experts by fused kernels
    corrections     models that mlx-lm builds or reads differently from transformers
    mlx_lm_imports  the import of mlx-lm without transformers; likewise mlx_vlm_, mlx_audio_imports

Outside of the engine's steps, models run as before. Each patch says why it exists and when it can
be removed: `functions.FUNCTIONS`, `functions.COLLECTIVES`, `modules.PATCHES`,
`corrections.CORRECTIONS`. Read `functions` first.
"""
