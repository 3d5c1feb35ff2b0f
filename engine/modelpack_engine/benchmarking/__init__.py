"""Loads for an engine, and what it makes of them."""
