"""Commands that need the engine or a running server; pyproject.toml lists them as entry points."""
