"""Parsers for tool calls and reasoning: model output to typed parts, without MLX or HTTP.

Read `parser` first.
"""
