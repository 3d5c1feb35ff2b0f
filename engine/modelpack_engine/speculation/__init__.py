"""Speculative decoding: tokens are proposed cheaply, and several are verified in one step.

`speculator` decides when to propose and how many tokens; `ngram`, `draft`, `eagle` and `assistant`
propose them, and `acceptance` chooses between lookups and a head. The scheduler adds proposals to a
step, and `runner/step.py` verifies them.
"""
