"""What /api/generate and /api/chat have in common: a request's fields in the engine's words."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from modelpack_engine.errors import BusyError, RequestError
from modelpack_engine.sampling_params import SamplingParams
from modelpack_server.api.ollama.bodies import TextBody
from modelpack_server.conversation.served import ServedModel
from modelpack_server.pool.ollama_options import parse_options
from modelpack_server.pool.pool import ModelPool
from modelpack_server.pool.presets import preset_named
from modelpack_server.pool.settings import ModelSettings
from modelpack_server.structured_output import Constraint

_EFFORTS = ("minimal", "low", "medium", "high", "max")


@dataclass(frozen=True, slots=True)
class Thinking:
    """Whether to think (None: as the model likes), and what to tell its template."""

    reasoning: bool | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)


def sampling(body: TextBody, model: ServedModel) -> tuple[SamplingParams, int | None]:
    """Return how to sample, and the most tokens; raises `RequestError`."""
    given = dict(parse_options(body.options).sampling)
    if body.logprobs:
        given["logprobs"] = body.top_logprobs
    limit = given.pop("max_tokens", None)
    if limit is None and "num_predict" not in body.options:
        limit = model.default("max_tokens")
    return model.sampling_params(given), limit


def constraint_of(body: TextBody) -> Constraint | None:
    """Return what the text has to be; raises `RequestError`."""
    match body.format:
        case None | "":
            return None
        case "json":
            return Constraint("json_object", "")
        case dict():
            return Constraint("json_schema", body.format)
    raise RequestError(f"format is {body.format!r}, expected json or a JSON schema", param="format")


def thinking_of(body: TextBody, model: ServedModel) -> Thinking:
    """Return what `think` asks for; raises `RequestError` for a model that cannot."""
    think = body.think
    if isinstance(think, str) and think not in _EFFORTS:
        raise RequestError(
            f"think is {think!r}, expected true, false, low, medium or high", param="think"
        )
    if think and model.format.reasoning is None:
        raise RequestError(f"{body.model!r} does not support thinking", param="think")
    if isinstance(think, str):
        return Thinking(True, {"reasoning_effort": think})
    return Thinking(think)


def refuse_images(images: list[Any], model: str) -> None:
    """Raise `RequestError` if there are images."""
    if images:
        raise RequestError(f"{model!r} does not support images: text only", param="images")


async def fit_context(pool: ModelPool, body: TextBody) -> None:
    """Have the model loaded with a context of `num_ctx` tokens where its default is a smaller one.

    It is never made smaller, what an operator chose is left alone, and a model that is in use stays
    as it is: prompts that do not fit are then refused. More than the model or the memory holds is
    cut to what they do.
    """
    asked = parse_options(body.options).context_size
    if asked is None:
        return
    stored = await pool.find(body.model)
    settings = await pool.settings(body.model)
    fields = settings.engine_fields()
    if settings.context_size or fields.get("max_model_len"):
        return
    preset = preset_named(settings.preset).context_size if settings.preset else None
    limit = fields.get("default_model_len") or preset or stored.context_size
    if limit is None or limit >= asked:
        return
    own = pool.configured().get(stored.key, ModelSettings())
    larger = replace(own, engine={**own.engine, "default_model_len": asked})
    with suppress(BusyError):
        await pool.configure(body.model, larger)
