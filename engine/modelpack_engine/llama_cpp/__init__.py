"""llama.cpp as a backend for GGUF models on a CPU, behind the engine's own scheduling and sampling.

`choosing` says when it is used. What runs in a step, in which order, how tokens are drawn and how
they become text is as in the engine on MLX: `engine` puts `context`, which computes, in the place
of a model of mlx-lm, and `slots` in the place of the prefix cache.
"""
