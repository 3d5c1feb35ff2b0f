"""HTTP over the engine: the OpenAI API, health and metrics."""
