"""What makes unmodified mlx-lm models run on rows: found at load, by looking at the model run."""

from modelpack_engine.patches import mlx_lm_imports

mlx_lm_imports.prepare()
