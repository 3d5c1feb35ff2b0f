"""Worker processes for untrusted files of models (chat templates, tokenizers), with hard limits.

`workers` hands jobs to processes (read it first), `process` starts and ends one and frames its
messages, `program` runs inside of it, and `threads` runs blocking calls off the event loop. A
worker has no MLX, no secrets in its environment, and no open files but its pipes.
"""
