"""Signatures, trust policies, SBOMs and licences of models.

Start with `signatures`, which finds and verifies signatures, and `policy`, which decides which
signatures a model needs. `sigstore` and `model_signing` are the formats of signatures.
"""
