"""Worker processes for untrusted files of models (chat templates, tokenizers), with hard limits.

`workers` assigns jobs to processes (read it first), `process` starts and ends a process and frames
its messages, `program` runs inside the process, and `threads` runs blocking calls off the event
loop. A worker has no MLX, no secrets in its environment, and no open files except its pipes.
"""
