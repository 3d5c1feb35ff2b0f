"""The verbs, by their Python interface."""
