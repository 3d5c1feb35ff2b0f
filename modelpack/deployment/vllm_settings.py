"""VllmSettings: what a package says about its model, as vLLM takes it.

vLLM reads a directory of transformers' files. What `modelpack package` adds to them (the context
size, a chat template under another name, defaults of sampling) goes in by vLLM's own options.
Source: vLLM 0.33.0, vllm/config/model.py `ModelConfig.get_diff_sampling_param`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modelpack import mediatypes
from modelpack.model import CHAT_TEMPLATE, Model, preferred_template

#: Parameters as Ollama spells them, in a generation_config.json.
_GENERATION: Mapping[str, str] = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
    "num_predict": "max_new_tokens",
}
_WITHOUT_A_WAY = (
    "presence_penalty", "frequency_penalty", "seed", "stop", "typical_p", "repeat_last_n",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """`chat_template` is the path in the model of a template that vLLM would not find by itself.

    `max_model_len` is in tokens, `generation` has the fields of a generation_config.json. `notes`
    name what the package says and vLLM has no option for.
    """

    max_model_len: int | None = None
    chat_template: str | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Model, own_context: int | None = None) -> VllmSettings:
        """Return the settings of a model; `own_context` is what its config.json says by itself."""
        files = model.files()
        at = preferred_template([(file.role, file.filepath or "") for file in files])
        template = None if at is None else files[at].filepath
        if template is not None and (template == CHAT_TEMPLATE or "/" in template):
            template = None
        context = model.config.context_size or None
        parameters, notes = _defaults(model.manifest.annotations)
        return cls(
            None if context == own_context else context,
            template,
            _generation(parameters),
            (*notes, *_unused(parameters)),
        )

    def options(self, chat_template: str) -> dict[str, object]:
        """Return vLLM's options by their long names; the template is at `chat_template`."""
        made: dict[str, object] = {}
        if self.max_model_len is not None:
            made["max-model-len"] = self.max_model_len
        if self.chat_template is not None:
            made["chat-template"] = chat_template
        if self.generation:
            made["override-generation-config"] = json.dumps(dict(self.generation))
        return made


def _defaults(annotations: Mapping[str, str]) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Return the parameters that a package gives as defaults, and notes about the rest."""
    try:
        value = json.loads(annotations.get(mediatypes.DEFAULTS, "{}"))
    except (ValueError, RecursionError):
        return {}, ()
    if not isinstance(value, dict):
        return {}, ()
    notes = tuple(
        f"vLLM has no option for the packaged {words}: clients have to send it"
        for key, words in (("system", "system prompt"), ("messages", "first messages"))
        if value.get(key)
    )
    parameters = value.get("parameters")
    return parameters if isinstance(parameters, dict) else {}, notes


def _generation(parameters: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in parameters.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in _GENERATION and is_number and (name != "num_predict" or value > 0):
            found[_GENERATION[name]] = value
    if "top_k" in found:
        found["top_k"] = max(0, found["top_k"])
    if found.get("top_p") == 0:  # the likeliest token alone, which vLLM says by top_k
        found |= {"top_p": 1.0, "top_k": 1}
    return dict(sorted(found.items()))


def _unused(parameters: Mapping[str, Any]) -> tuple[str, ...]:
    unused = [name for name in _WITHOUT_A_WAY if parameters.get(name) is not None]
    if not unused:
        return ()
    return (f"vLLM has no default for {', '.join(unused)}: clients have to send it",)
