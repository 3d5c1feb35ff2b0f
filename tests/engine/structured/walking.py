"""A random walk through a grammar, like a model with random logits."""

from __future__ import annotations

import random

import numpy as np

from modelpack_engine.models.tokenizer import Tokenizer
from modelpack_server.structured_output import Grammar, GrammarMask


def bits_of(allowed: bytes) -> list[int]:
    """Return the token ids that a mask allows."""
    found = np.unpackbits(np.frombuffer(allowed, np.uint8), bitorder="little")
    ids: list[int] = found.nonzero()[0].tolist()
    return ids


def take(mask: GrammarMask, tokenizer: Tokenizer, text: str) -> None:
    """Make the mask accept a text, and check that it allows each token."""
    for token in tokenizer.encode(text, add_special_tokens=False):
        assert token in bits_of(mask.allowed()), tokenizer.token_bytes(token)
        mask.accept(token)


def accepts(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Return whether the grammar allows a text, token by token, followed by the end."""
    mask = grammar.mask()
    for token in tokenizer.encode(text, add_special_tokens=False):
        if token not in bits_of(mask.allowed()):
            return False
        mask.accept(token)
    return mask.is_complete


def walk(
    grammar: Grammar, tokenizer: Tokenizer, seed: int, steps: int = 400, closing: str = ""
) -> str | None:
    """Return a text that the grammar allows, chosen token by token; None if it has no end in time.

    Ends are taken where they may be, and after a while whatever closes a string or a bracket, or is
    part of `closing`.
    """
    planned: list[int] = []
    chooser, mask, tokens = random.Random(seed), grammar.mask(), list[int]()
    closers = {tokenizer.token_id(text) for text in ('"', "}", "]", '"}', '"]')}
    for step in range(steps):
        allowed = bits_of(mask.allowed())
        assert allowed, "a mask that allows nothing"
        ends = sorted(tokenizer.eos_token_ids.intersection(allowed))
        if ends and (len(ends) == len(allowed) or chooser.random() < 0.3):
            mask.accept(ends[0])
            assert set(bits_of(mask.allowed())) <= tokenizer.eos_token_ids
            return b"".join(map(tokenizer.token_bytes, tokens)).decode()
        allowed = [token for token in allowed if token not in ends]
        if step > 30:
            planned = planned or tokenizer.encode(closing, add_special_tokens=False)
            if planned and planned[0] in allowed:
                allowed = [planned.pop(0)]
            else:
                allowed = sorted(closers.intersection(allowed)) or allowed
        tokens.append(chooser.choice(allowed))
        mask.accept(tokens[-1])
    return None
