"""Tool-call and reasoning formats: what a model writes -> typed parts. No MLX, no HTTP."""
