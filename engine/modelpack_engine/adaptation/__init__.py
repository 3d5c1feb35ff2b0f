"""What makes unmodified mlx-lm models run on rows: found at load, by looking at the model run."""
