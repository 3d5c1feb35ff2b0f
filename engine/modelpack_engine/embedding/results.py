"""Options and results of embedding models. Nothing here loads MLX."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: float32, one dimension.
Vector = NDArray[np.float32]

#: A query and a document.
Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The vectors in the order of the inputs, and how many tokens each of these had."""

    vectors: tuple[Vector, ...]
    token_counts: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """The tokens of all inputs."""
        return sum(self.token_counts)


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """How a request wants its vectors.

    `dimensions` keeps that many numbers of each vector and makes its length 1 again, which models
    trained for it (Matryoshka) bear. `normalize` None is as the model's files say. `truncate`
    cuts inputs that are too long, which are refused else. `prompt` names one of the model's.
    `noun` is what errors call the inputs: the field of the request that holds them.
    """

    dimensions: int | None = None
    normalize: bool | None = None
    truncate: bool = False
    prompt: str | None = None
    noun: str = "input"


@dataclass(frozen=True, slots=True)
class Scores:
    """One number for each pair, the higher the better, and how many tokens were read for each."""

    values: tuple[float, ...]
    token_counts: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """The tokens of all pairs."""
        return sum(self.token_counts)


def sigmoid(logit: float) -> float:
    """Return 1 / (1 + exp(-logit)), without overflow."""
    return float(0.5 * (1.0 + np.tanh(0.5 * logit)))
