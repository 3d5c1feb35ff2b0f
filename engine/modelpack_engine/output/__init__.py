"""Tool-call and reasoning formats: what a model writes -> typed parts. Knows neither MLX nor HTTP."""
