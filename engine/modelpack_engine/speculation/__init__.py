"""Speculative decoding: tokens proposed cheaply, verified many in a step.

`fitting` and `verification` are plain integers; `speculator` decides when proposals are worth
having; `ngram` and `draft` make them.
"""
