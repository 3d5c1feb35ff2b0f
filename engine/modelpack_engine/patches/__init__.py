"""Everything that the engine changes in MLX and mlx-lm at run time.

    functions       functions replaced in the process; `install` and `uninstall`
    modules         calls of single modules of a model, by their class; `ClassSwaps.undo`
    decoder         decoder layers by fused kernels; experts: mixtures of experts
    recognition     whether a class computes what a known class does
    corrections     models that mlx-lm makes or reads differently from transformers
    class_swaps     how one module gets another call, and its class back
    mlx_lm_imports  the import of mlx-lm without transformers

Nothing here changes how models run outside of the engine's steps. Each patch says why it exists
and when it can be removed: `functions.FUNCTIONS`, `functions.COLLECTIVES`, `modules.PATCHES`,
`corrections.CORRECTIONS`. Read `functions` first.
"""
