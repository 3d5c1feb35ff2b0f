"""The metadata of a model card: the YAML at the beginning of a README.md.

Source: the Hugging Face Hub's documentation, "Model Cards". Cards are written by hand and come from
strangers, so a card that does not parse says nothing, and only a few top-level keys are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

#: The metadata of the evaluations in a card may be long; the keys that are read are not.
_MAX_CHARACTERS: Final = 16 * 1024
_MAX_ITEMS: Final = 64
_HUB: Final = "https://huggingface.co/"
_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\n---[ \t]*\r?(?:\n|\Z)", re.DOTALL)
_KEY = re.compile(r"([A-Za-z_][\w-]*)[ \t]*:(?:\s|\Z)")
_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?\Z", re.ASCII)
_READ: Final = frozenset({
    "author", "authors", "base_model", "datasets", "license", "license_name",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the metadata of a card says, as it is written there; texts without a value are empty."""

    license: str = ""
    license_name: str = ""
    authors: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()

    @classmethod
    def parse(cls, readme: str) -> ModelCard:
        """Return the card in the text of a README.md; an empty one if it has no valid metadata."""
        value = _metadata(readme)
        return cls(
            _first(value, "license"),
            _first(value, "license_name"),
            _texts(value, "authors") or _texts(value, "author"),
            _texts(value, "datasets"),
            _texts(value, "base_model"),
        )


def hub_url(name: str, kind: str = "") -> str:
    """Return the address of `name` on the Hub if it has the form of an id there, otherwise "".

    `kind` is "" for a model, whose id has an owner, or "datasets".
    """
    if not _ID.match(name) or (not kind and "/" not in name):
        return ""
    return f"{_HUB}{kind}/{name}" if kind else _HUB + name


def _metadata(readme: str) -> Mapping[str, Any]:
    """Return the keys that are read, with scalars as texts, without tags and merge keys."""
    front = _FRONT.match(readme)
    if front is None:
        return {}
    kept, wanted = [], False
    for line in front[1].splitlines():
        if found := _KEY.match(line):
            wanted = found[1] in _READ
        if wanted:
            kept.append(line)
    text = "\n".join(kept)
    if len(text) > _MAX_CHARACTERS:
        return {}
    import yaml

    try:
        value = yaml.load(text, Loader=yaml.BaseLoader)  # noqa: S506 - makes texts, no objects
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _texts(value: Mapping[str, Any], key: str) -> tuple[str, ...]:
    found = value.get(key)
    items = found if isinstance(found, list) else [found]
    texts = [text.strip() for text in items[:_MAX_ITEMS] if isinstance(text, str)]
    return tuple(dict.fromkeys(text for text in texts if text))


def _first(value: Mapping[str, Any], key: str) -> str:
    return next(iter(_texts(value, key)), "")
