"""Tool-call and reasoning parsers: model output to typed parts. No MLX, no HTTP. Read `parser`
first.
"""
