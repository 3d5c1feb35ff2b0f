"""Signatures, trust policies, SBOMs, licences and attestations; start with signatures.py."""
