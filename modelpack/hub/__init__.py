"""Models of the Hugging Face Hub, as a source that pulls and copies read like a registry."""
