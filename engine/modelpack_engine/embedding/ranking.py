"""rank_pairs: how well documents answer queries, by whatever model there is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from modelpack_engine.embedding.async_embedder import AsyncEmbedder
from modelpack_engine.embedding.results import EmbedOptions, Pair, Vector, sigmoid


async def rank_pairs(
    model: AsyncEmbedder,
    pairs: Sequence[Pair],
    *,
    truncate: bool = False,
    nouns: tuple[str, str] = ("query", "documents"),
) -> tuple[list[float], int]:
    """Return a score for each (query, document), the higher the better, and the tokens read.

    A cross-encoder's score is the sigmoid of its logit, between 0 and 1; an embedding model's is
    the cosine of the two vectors, between -1 and 1. `nouns` are what errors call the texts. Raises
    what `AsyncEmbedder.embed` and `AsyncEmbedder.score` raise.
    """
    if model.ranks_pairs:
        scores = await model.score(pairs, truncate=truncate)
        return [sigmoid(logit) for logit in scores.values], scores.num_tokens
    # Each text is embedded once, however many pairs it is part of.
    first, second = (list(dict.fromkeys(texts)) for texts in zip(*pairs, strict=True))
    left, right = await asyncio.gather(
        *(
            model.embed(texts, EmbedOptions(truncate=truncate, noun=noun))
            for texts, noun in zip((first, second), nouns, strict=True)
        )
    )
    queries = dict(zip(first, left.vectors, strict=True))
    documents = dict(zip(second, right.vectors, strict=True))
    values = [_cosine(queries[query], documents[document]) for query, document in pairs]
    return values, left.num_tokens + right.num_tokens


def _cosine(left: Vector, right: Vector) -> float:
    lengths = float(np.linalg.norm(left)) * float(np.linalg.norm(right))
    return float(np.dot(left, right)) / lengths if lengths else 0.0
