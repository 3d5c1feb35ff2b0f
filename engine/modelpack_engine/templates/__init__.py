"""Chat templates, rendered within a budget of time and memory.

Nothing here imports MLX or the engine, so that a worker process (`modelpack_engine.worker`) starts
quickly and holds little. `rendering` renders, `environment` is the Jinja environment, `budget`
charges what a template does.
"""
