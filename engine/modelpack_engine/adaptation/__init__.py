"""What makes unmodified mlx-lm models run on rows: found at load, by looking at the model run."""

from modelpack_engine import lean_mlx_lm

lean_mlx_lm.prepare()
