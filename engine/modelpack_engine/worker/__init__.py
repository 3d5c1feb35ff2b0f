"""A worker process for what a model's files make us compute: it has limits, and can be killed.

`workers` hands jobs to worker processes, `process` starts and ends one, `program` is what runs in
it, `frames` are its messages. The worker has no MLX, no secrets of the environment and no files
open but its pipes.
"""
