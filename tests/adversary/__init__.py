"""Attacks on a real server process, as tables: what an attacker sends, and what must come back."""
