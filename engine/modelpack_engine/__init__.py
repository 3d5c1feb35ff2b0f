"""The serving engine of Modelpack: paged attention and continuous batching on MLX.

Its code arrives with the next release; this is its place.
"""
