"""Chat templates, rendered within a budget of time and memory.

Nothing here imports MLX or the engine, so that a worker process (`modelpack_engine.worker`) starts
quickly and uses little memory. `environment` is the Jinja environment and renders (read it first),
`budget` charges what a template does, `filters` are its filters and methods, `go_template`
translates Ollama's templates.
"""
