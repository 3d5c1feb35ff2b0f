"""Outputs of models of all families, and their parts."""

from __future__ import annotations

from tests.engine.output import cases_chat, cases_code, cases_tags, cases_tokens

CASES = [*cases_chat.CASES, *cases_tags.CASES, *cases_tokens.CASES, *cases_code.CASES]
