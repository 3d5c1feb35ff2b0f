"""What is said about a model, and by whom: signatures, who is trusted, SBOMs, attestations."""
