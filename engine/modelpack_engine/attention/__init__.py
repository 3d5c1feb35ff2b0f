"""Paged attention: the caches that a model's layers are given, and how they attend.

A model calls a `PagedKV` (`paged`, read it first) like a KV cache of mlx-lm. It writes to
`kv_pools`, returns handles (`cache_handle`), and attends by kernels or `gather`, with the arrays of
the step that `metadata` keeps.
"""
