"""Request bodies of the Ollama API.

Source: its docs/api.md, and the official Python client.

Unknown fields are ignored, a null field counts as missing, and `name` is an old name of `model`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import Field, StrictBool, StrictInt, StrictStr, model_validator

from modelpack.errors import DeniedError
from modelpack_server.api.bodies import SparseBody
from modelpack_server.gateway.caller import caller_of
from modelpack_server.gateway.forwarding import is_direct

KeepAlive = StrictStr | StrictInt | float


class ModelBody(SparseBody):
    """A body that names a model."""

    model: Annotated[StrictStr, Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, value: Any) -> Any:
        if isinstance(value, dict) and not value.get("model") and value.get("name"):
            return {**value, "model": value["name"]}
        return value


class TextBody(ModelBody):
    """The common fields of /api/generate and /api/chat."""

    format: StrictStr | dict[str, Any] | None = None
    options: dict[str, Any] = {}
    think: StrictBool | StrictStr | None = None
    keep_alive: KeepAlive | None = None
    logprobs: StrictBool = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] = 0
    stream: StrictBool = True


class GenerateBody(TextBody):
    """The body of POST /api/generate."""

    prompt: StrictStr = ""
    suffix: StrictStr = ""
    system: StrictStr = ""
    template: StrictStr = ""
    context: list[StrictInt] = []
    raw: StrictBool = False
    images: list[Any] = []


class CalledFunction(SparseBody):
    """A function and its arguments; some clients send the arguments as a string."""

    name: StrictStr
    arguments: dict[str, Any] | StrictStr = {}


class Call(SparseBody):
    """A tool call of an earlier reply."""

    id: StrictStr = ""
    function: CalledFunction


class ChatMessage(SparseBody):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr = ""
    thinking: StrictStr = ""
    images: list[Any] = []
    tool_calls: list[Call] = []
    tool_name: StrictStr = ""
    tool_call_id: StrictStr = ""


class OfferedFunction(SparseBody):
    """A function that the model may call."""

    name: Annotated[StrictStr, Field(min_length=1)]
    description: StrictStr = ""
    parameters: dict[str, Any] = {}


class OfferedTool(SparseBody):
    """A tool; functions are the only kind."""

    type: Literal["function"] = "function"
    function: OfferedFunction


class ChatBody(TextBody):
    """The body of POST /api/chat."""

    messages: list[ChatMessage] = []
    tools: list[OfferedTool] = []


class EmbedBody(ModelBody):
    """The body of POST /api/embed."""

    input: StrictStr | list[StrictStr] = []
    truncate: StrictBool = True
    dimensions: Annotated[StrictInt, Field(ge=0)] = 0
    options: dict[str, Any] = {}
    keep_alive: KeepAlive | None = None


class EmbeddingsBody(ModelBody):
    """The body of the older route POST /api/embeddings."""

    prompt: StrictStr = ""
    options: dict[str, Any] = {}
    keep_alive: KeepAlive | None = None


class ShowBody(ModelBody):
    """The body of POST /api/show."""

    verbose: StrictBool = False


class TransferBody(ModelBody):
    """The body of POST /api/pull and /api/push."""

    insecure: StrictBool = False
    stream: StrictBool = True


class CopyBody(SparseBody):
    """The body of POST /api/copy."""

    source: Annotated[StrictStr, Field(min_length=1)]
    destination: Annotated[StrictStr, Field(min_length=1)]


class CreateBody(ModelBody):
    """The body of POST /api/create; `base` is the field `from`."""

    base: StrictStr = Field("", alias="from")
    files: dict[str, StrictStr] = {}
    adapters: dict[str, StrictStr] = {}
    template: StrictStr = ""
    license: StrictStr | list[StrictStr] = []
    system: StrictStr = ""
    parameters: dict[str, Any] = {}
    messages: list[ChatMessage] = []
    quantize: StrictStr = ""
    modelfile: StrictStr = ""
    stream: StrictBool = True


def check_request_template(request: Request, *, allowed: bool) -> None:
    """Raise `DeniedError` unless the sender of `request` may send a chat template.

    A template is code, so the sender needs an API key that allows all models. On a server without
    keys, the request must come from this machine. `allowed` is the server's option.
    """
    if not allowed:
        raise DeniedError(
            "chat template refused: this server accepts no templates in requests",
            hint="remove `template`, or start the server with --allow-request-templates",
        )
    caller = caller_of(request.scope)
    if caller.is_restricted or (caller.owner is None and not is_direct(request.scope)):
        raise DeniedError(
            "chat template refused: only admins may send templates",
            hint="remove `template`, or use a key without a list of models",
        )
