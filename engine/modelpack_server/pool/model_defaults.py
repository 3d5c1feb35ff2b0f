"""ModelDefaults: how a package says that its model is to be used, where a request says nothing.

It is an annotation of the manifest, so it goes wherever the model goes, and a store that is opened
again has it. Its value is JSON: `{"parameters": {...}, "system": "...", "messages": [...]}`, the
parameters in Ollama's spelling.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modelpack import mediatypes, ollama
from modelpack.blob import read_blob
from modelpack.model import Model
from modelpack.stores.layout import LayoutStore
from modelpack_engine.errors import RequestError
from modelpack_server.conversation.preface import Preface
from modelpack_server.pool.ollama_options import parse_options

_log = logging.getLogger(__name__)

#: The key of the annotation.
ANNOTATION = mediatypes.DEFAULTS


@dataclass(frozen=True, slots=True)
class ModelDefaults:
    """`parameters` are as they were given. `messages` are as chat templates take them."""

    parameters: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""
    messages: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, annotations: Mapping[str, str]) -> ModelDefaults:
        """Return what a manifest's annotations say; what is no such thing in them is ignored."""
        try:
            value = json.loads(annotations.get(ANNOTATION, "{}"))
        except (ValueError, RecursionError):
            return cls()
        if not isinstance(value, dict):
            return cls()
        parameters, system = value.get("parameters"), value.get("system")
        messages = value.get("messages")
        return cls(
            parameters if isinstance(parameters, dict) else {},
            system if isinstance(system, str) else "",
            tuple(m for m in messages if _is_message(m)) if isinstance(messages, list) else (),
        )

    @classmethod
    def of_model(cls, model: Model, store: LayoutStore) -> ModelDefaults:
        """Return what a stored model says: in the annotation, or in layers of Ollama's."""
        if not model.manifest.is_ollama:
            return cls.of(model.manifest.annotations)
        said = ollama.defaults(model.manifest.layers, lambda layer: read_blob(store, layer))
        return cls.of({ANNOTATION: said} if said else {})

    def annotation(self) -> dict[str, str]:
        """Return the annotation that says this."""
        value: dict[str, Any] = {}
        if self.parameters:
            value["parameters"] = dict(self.parameters)
        if self.system:
            value["system"] = self.system
        if self.messages:
            value["messages"] = list(self.messages)
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        return {ANNOTATION: text} if value else {}

    def sampling(self) -> Mapping[str, Any]:
        """Return the parameters as fields of SamplingParams: none where they make no sense."""
        try:
            return parse_options(self.parameters).sampling
        except RequestError as error:  # whoever packaged it did not check; it can be used still
            _log.warning("the parameters of a model are ignored: %s", error)
            return {}

    @property
    def preface(self) -> Preface:
        """What comes before every conversation."""
        return Preface(self.system, self.messages)


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )
