"""What the scripts beside this one share: their arguments, and the JSON that they print."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable

QUESTION = "What is the capital of France?"
TEXTS = ["Paris is a city.", "It rains."]


def parameters() -> tuple[str, str, str]:
    """Return the server's address, the chat model and the embedding model."""
    url, chat_model, embedding_model = sys.argv[1:]
    return url, chat_model, embedding_model


class Results:
    """What each feature returned, or the traceback of its exception as {"error": text}."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, object]] = {}

    def add(
        self, name: str, feature: Callable[..., dict[str, object]], **arguments: object
    ) -> None:
        try:
            self._found[name] = feature(**arguments)
        except Exception:
            self._found[name] = {"error": traceback.format_exc()}

    def run(self, feature: Callable[[], dict[str, object]]) -> None:
        """Decorate a feature: call it, and keep its result by its name."""
        self.add(feature.__name__, feature)

    def print(self) -> None:
        print(json.dumps(self._found))
