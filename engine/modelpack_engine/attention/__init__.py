"""Paged attention: what a model's layers see instead of a KV cache, and how it is computed."""
