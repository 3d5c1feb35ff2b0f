"""Request bodies of the Responses API: input items, and tools, alone or in namespaces."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr, ValidationError

from modelpack_engine.errors import RequestError
from modelpack_server.api.bodies import Body, SparseBody
from modelpack_server.api.continuation import carried
from modelpack_server.api.openai.requests import (
    Effort,
    FunctionFields,
    SamplingFields,
    check_choice,
    choice_of,
    constraint_of,
    unknown_part,
)
from modelpack_server.conversation.pictures import PictureReader
from modelpack_server.structured_output import Constraint
from modelpack_server.tool_parsers.parts import Tool, ToolChoice


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The tools for the model and the tool choice. The model sees no namespaces: `namespaces` maps
    the names that it sees to a namespace and a name within it.
    """

    tools: tuple[Tool, ...]
    choice: ToolChoice
    namespaces: Mapping[str, tuple[str, str]]


def joined_name(namespace: str | None, name: str) -> str:
    """Return the name of a function that the model sees."""
    return f"{namespace}__{name}" if namespace else name


def toolbox_of(given: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any]) -> Toolbox:
    """Return the tools and the tool choice.

    Raises `RequestError` for tools other than functions, and for a choice of an unknown function.
    """
    tools: list[Tool] = []
    namespaces: dict[str, tuple[str, str]] = {}
    for i, fields in enumerate(given):
        if fields.get("type") == "namespace":
            grouped = _namespace(fields, f"tools[{i}]")
            tools += grouped.values()
            namespaces |= {tool.name: (str(fields["name"]), name) for name, tool in grouped.items()}
        else:
            tools.append(_function(fields, f"tools[{i}]"))
    if isinstance(choice, Mapping) and isinstance(choice.get("name"), str):
        choice = {**choice, "name": joined_name(choice.get("namespace"), choice["name"])}
    chosen = choice_of(choice if isinstance(choice, str) else dict(choice))
    check_choice(tools, chosen)
    return Toolbox(tuple(tools), chosen, namespaces)


def _namespace(given: Mapping[str, Any], where: str) -> dict[str, Tool]:
    """Return the functions of a namespace by name; the first gets the namespace's description."""
    name, inner = given.get("name"), given.get("tools")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{where}.name is required and must be a string", param=f"{where}.name")
    if not isinstance(inner, list) or not all(isinstance(fields, dict) for fields in inner):
        raise RequestError(f"{where}.tools is not a list of tools", param=f"{where}.tools")
    functions: dict[str, Tool] = {}
    for i, fields in enumerate(inner):
        function = _function(fields, f"{where}.tools[{i}]")
        about = given.get("description")
        text = function.description
        if not functions and isinstance(about, str) and about:
            text = f"{about}\n\n{text}"
        own = replace(function, name=joined_name(name, function.name), description=text)
        functions[function.name] = own
    return functions


def _function(given: Mapping[str, Any], where: str) -> Tool:
    kind = given.get("type")
    if kind != "function":
        raise RequestError(
            f"tools of type {kind!r} are not supported, only functions", param=f"{where}.type"
        )
    try:
        return FunctionFields.model_validate(given).tool()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([where, *map(str, first["loc"])])
        raise RequestError(f"{place}: {first['msg']}", param=place) from None


#: The supported values of `include`; the others concern hosted tools.
CARRIED_REASONING = "reasoning.encrypted_content"
LOGPROBS = "message.output_text.logprobs"

#: The limit of JSON characters in the fields that each response event may repeat.
MAX_REPEATED = 1024 * 1024
_REPEATED = frozenset(("tools", "tool_choice", "text", "reasoning", "metadata", "user"))

# Fields of a hosted service: ignoring them would silently change the behaviour.
_HOSTED = ("prompt", "moderation")


class ReasoningFields(Body):
    """The `reasoning` field: how much the model reasons, and whether it is summarised."""

    effort: Effort | None = None
    summary: StrictStr | None = None


class TextFields(Body):
    """The `text` field: the format of the reply's text."""

    format: dict[str, Any] | None = None
    verbosity: StrictStr | None = None


class ConversationReference(Body):
    """The `conversation` field, if it is not just an id."""

    id: StrictStr


class InputRequest(SparseBody):
    """The fields that determine the prompt: the body of POST /v1/responses/input_tokens."""

    model: Annotated[StrictStr, Field(min_length=1)]
    input: StrictStr | list[dict[str, Any]] = ""
    instructions: StrictStr | None = None
    previous_response_id: StrictStr | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: StrictStr | dict[str, Any] = "auto"
    parallel_tool_calls: StrictBool = True
    text: TextFields | None = None
    reasoning: ReasoningFields | None = None
    reasoning_effort: Effort | None = None  # sent by some clients
    truncation: Literal["auto", "disabled"] = "disabled"
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    conversation: StrictStr | ConversationReference | None = None

    def check_input(self) -> None:
        """Raise `RequestError` for unsupported fields, and for two sources of earlier turns."""
        for name in _HOSTED:
            if getattr(self, name, None) not in (None, False):
                raise RequestError(f"{name} is not supported by a local server", param=name)
        if self.conversation is not None and self.previous_response_id is not None:
            raise RequestError(
                "conversation and previous_response_id cannot be used together",
                param="conversation",
            )

    @property
    def conversation_id(self) -> str | None:
        """The id of the conversation that the request continues."""
        given = self.conversation
        return given.id if isinstance(given, ConversationReference) else given

    @property
    def effort(self) -> str | None:
        """The reasoning effort."""
        return (self.reasoning.effort if self.reasoning else None) or self.reasoning_effort

    def constraint(self) -> Constraint | None:
        """Return the constraint on the text, or None; raises `RequestError`."""
        wanted = self.text.format if self.text is not None else None
        if wanted is None or wanted.get("type") != "json_schema":
            return constraint_of(wanted)
        return constraint_of({"type": "json_schema", "json_schema": wanted})


class ResponseRequest(InputRequest, SamplingFields):
    """The body of POST /v1/responses."""

    store: StrictBool = True
    max_output_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_tool_calls: Annotated[StrictInt, Field(ge=1)] | None = None
    include: list[StrictStr] = Field(default_factory=list)
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    background: StrictBool | None = None
    prompt: Any = None
    moderation: Any = None

    def check(self) -> None:
        """Raise `RequestError` for fields that contradict each other or are not supported."""
        super().check()
        if self.n != 1:
            raise RequestError(f"n is {self.n}, expected 1: a response has one choice", param="n")
        if self.background and not self.store:
            raise RequestError("store must be true with background", param="store")
        self.check_input()

    def check_repeated(self) -> None:
        """Raise `RequestError` if repeated fields exceed `MAX_REPEATED`. Call it in a thread."""
        size = len(json.dumps(self.model_dump(include=set(_REPEATED)), ensure_ascii=False))
        if size > MAX_REPEATED:
            names = ", ".join(sorted(_REPEATED))
            raise RequestError(
                f"{names} have {size} characters in total, the limit is {MAX_REPEATED}",
                param="metadata",
            )

    @property
    def wants_logprobs(self) -> bool:
        """Whether the reply includes log-probabilities."""
        return self.top_logprobs is not None or LOGPROBS in self.include


Item = dict[str, Any]
_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal",
          "reasoning_text": "text", "summary_text": "text"}  # fmt: skip


def new_id(prefix: str) -> str:
    """Return a new random id in the API's form."""
    return f"{prefix}_{uuid.uuid4().hex}"


def items_of(
    given: str | Sequence[Mapping[str, Any]],
    find: Callable[[str], Item | None],
    where: str = "input",
) -> list[Item]:
    """Return the validated items of the field `where`, each with an id.

    `find` returns the item with the id of an `item_reference`. Raises `RequestError` with the
    place of the invalid item.
    """
    if isinstance(given, str):
        return [_message({"role": "user", "content": given}, where)] if given else []
    references = Counter(
        str(item.get("id")) for item in given if item.get("type") == "item_reference"
    )
    for name, count in references.items():
        if count > 1:  # many references to a large item would make a huge prompt
            raise RequestError(f"the item {name!r} is referenced {count} times", param=where)
    return [_item(item, f"{where}[{i}]", find) for i, item in enumerate(given)]


def _item(given: Mapping[str, Any], where: str, find: Callable[[str], Item | None]) -> Item:
    kind = given.get("type") or ("message" if "role" in given else None)
    match kind:
        case "message":
            return _message(given, where)
        case "function_call":
            texts = {key: _text_field(given, key, where) for key in ("call_id", "name")}
            call = {"arguments": _text_field(given, "arguments", where) or "{}"}
            if isinstance(given.get("namespace"), str):
                call["namespace"] = given["namespace"]
            return _with_id(given, "fc") | {"type": kind, **texts, **call, "status": "completed"}
        case "function_call_output":
            call_id = _text_field(given, "call_id", where)
            output = given.get("output")
            if not isinstance(output, (str, list)):
                raise RequestError("output is neither a string nor a list", param=f"{where}.output")
            plain_text(output, f"{where}.output", pictures=True)
            return _with_id(given, "fco") | {"type": kind, "call_id": call_id, "output": output}
        case "reasoning":
            return _reasoning(given, where)
        case "item_reference":
            found = find(str(given.get("id")))
            if found is None:
                raise RequestError(f"no such item: {given.get('id')!r}", param=f"{where}.id")
            return found
    raise RequestError(f"items of type {kind!r} are not supported", param=f"{where}.type")


def _message(given: Mapping[str, Any], where: str) -> Item:
    role = given.get("role")
    if role not in _ROLES:
        raise RequestError(
            f"role is {role!r}, expected one of {', '.join(_ROLES)}", param=f"{where}.role"
        )
    content = given.get("content")
    plain_text(content, f"{where}.content", pictures=role == "user")
    if isinstance(content, str):
        said = role == "assistant"
        part: Item = {"type": "output_text" if said else "input_text", "text": content}
        content = [part | ({"annotations": []} if said else {})]
    item = {"type": "message", "role": role, "status": "completed", "content": content}
    return _with_id(given, "msg") | item


def _reasoning(given: Mapping[str, Any], where: str) -> Item:
    item = _with_id(given, "rs") | {"type": "reasoning"}
    for key in ("summary", "content"):
        parts = given.get(key) or []
        plain_text(parts, f"{where}.{key}")
        item[key] = parts
    if given.get("encrypted_content"):
        item["encrypted_content"] = given["encrypted_content"]
    return item


def _with_id(given: Mapping[str, Any], prefix: str) -> Item:
    known = given.get("id")
    return {"id": known if isinstance(known, str) and known else new_id(prefix)}


def _text_field(given: Mapping[str, Any], key: str, where: str) -> str:
    text = given.get(key)
    if not isinstance(text, str):
        raise RequestError(f"{key} is required and must be a string", param=f"{where}.{key}")
    return text


#: Parts of users' messages that models with vision or hearing read.
_MEDIA = ("input_image", "input_file", "input_audio")


def plain_text(content: Any, where: str, *, pictures: bool = False) -> str:
    """Return the text of content, which has nothing else but `pictures` if these are allowed.

    `where` names it in errors.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError("content is neither a string nor a list of parts", param=where)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if pictures and kind == "input_file":
            if not isinstance(part.get("file_data"), str):
                raise RequestError(
                    f"{where}[{i}]: file_data is required and must be a string",
                    param=f"{where}[{i}]",
                    hint="send the file as data:application/pdf;base64,…; uploaded files and URLs"
                    " are not read",
                )
            continue
        if pictures and kind == "input_image":
            if not isinstance(part.get("image_url"), str):
                raise RequestError(
                    f"{where}[{i}]: image_url is required and must be a string",
                    param=f"{where}[{i}]",
                    hint="send the picture as a data: URL; files are not read",
                )
            continue
        if pictures and kind == "input_audio":
            if not isinstance(part.get("input_audio"), Mapping):
                raise RequestError(
                    f"{where}[{i}]: input_audio is required and must be an object",
                    param=f"{where}[{i}]",
                    hint="send the sound as base64 in data, and its format",
                )
            continue
        text = part.get(_TEXTS[kind]) if isinstance(kind, str) and kind in _TEXTS else None
        if not isinstance(text, str):
            raise unknown_part(kind, f"{where}[{i}]", (*_TEXTS, *_MEDIA))
        texts.append(text)
    return "".join(texts)


def _content(
    content: str | list[dict[str, Any]], where: str, pictures: PictureReader | None
) -> str | list[dict[str, Any]]:
    """Return text, or a list of parts if there are pictures, sounds or documents."""
    if pictures is None or isinstance(content, str):
        return plain_text(content, where)
    if all(part["type"] not in _MEDIA for part in content):
        return plain_text(content, where)
    parts = []
    for i, part in enumerate(content):
        if part["type"] == "input_image":
            parts.append(pictures.url(part["image_url"], f"{where}[{i}]", part.get("detail")))
        elif part["type"] == "input_file":
            parts.append(pictures.document(part["file_data"], f"{where}[{i}]"))
        elif part["type"] == "input_audio":
            parts.append(pictures.sound(part["input_audio"], f"{where}[{i}]"))
        else:
            parts.append({"type": "text", "text": plain_text([part], where)})
    return parts


def template_messages(
    instructions: str | None,
    items: Sequence[Item],
    pictures: PictureReader | None = None,
    num_earlier: int = 0,
) -> list[dict[str, Any]]:
    """Return a conversation in the form that chat templates expect.

    Reasoning, text and tool calls of one assistant turn become one message. The content of a
    message with pictures is a list of parts; without `pictures`, they are refused. Those of tools'
    outputs begin a message of the user: templates show texts of tools only. The first
    `num_earlier` items are not those of the request's input, whose places errors name.
    """
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    turn: dict[str, Any] | None = None
    files: list[dict[str, Any]] = []  # of the tools before
    for i, item in enumerate(items, -num_earlier):
        where = f"input[{i}]" if i >= 0 else "input"
        if item["type"] == "function_call_output":
            turn = None
            text, more = _output(item["output"], f"{where}.output", pictures)
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": text})
            files += more
            continue
        role = item.get("role", "assistant")
        if files and role != "user":
            messages.append({"role": "user", "content": files})
            files = []
        if role != "assistant":
            turn = None
            message = _others(item, where, pictures)
            if files:
                said = message["content"]
                rest = [{"type": "text", "text": said}] if isinstance(said, str) else said
                message["content"], files = files + rest, []
            messages.append(message)
            continue
        if turn is None or _is_begun(turn, item):
            turn = {"role": "assistant", "content": [], "reasoning_content": []}
            messages.append(turn)
        _add(turn, item)
    if files:
        messages.append({"role": "user", "content": files})
    return [_with_texts(message) for message in messages]


def _with_texts(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose collected texts are joined."""
    if message["role"] != "assistant":
        return message
    thoughts = "".join(message.pop("reasoning_content"))
    message["content"] = "".join(message["content"])
    return message | ({"reasoning_content": thoughts} if thoughts else {})


def _output(
    output: str | list[dict[str, Any]], where: str, pictures: PictureReader | None
) -> tuple[str, list[dict[str, Any]]]:
    """Return the text of a tool's output, and its pictures, sounds and documents."""
    content = _content(output, where, pictures)
    if isinstance(content, str):
        return content, []
    text = "".join(part["text"] for part in content if part["type"] == "text")
    return text, [part for part in content if part["type"] != "text"]


def _others(item: Item, where: str, pictures: PictureReader | None) -> dict[str, Any]:
    role = "system" if item["role"] == "developer" else item["role"]
    if role != "user":
        pictures = None
    return {"role": role, "content": _content(item["content"], f"{where}.content", pictures)}


def _is_begun(turn: Mapping[str, Any], item: Item) -> bool:
    """Return whether a turn already has content that follows `item` within a turn.

    Then `item` begins the next turn.
    """
    if item["type"] == "function_call":
        return False
    if item["type"] == "message":
        return "tool_calls" in turn
    return "tool_calls" in turn or bool(turn["content"])


def _add(turn: dict[str, Any], item: Item) -> None:
    match item["type"]:
        case "message":
            if text := plain_text(item["content"], "input"):
                turn["content"].append(text)
        case "function_call":
            name = joined_name(item.get("namespace"), item["name"])
            function = {"name": name, "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            turn.setdefault("tool_calls", []).append(call)
        case "reasoning":
            text = (
                plain_text(item["content"], "input")
                or carried(item.get("encrypted_content"))
                or plain_text(item["summary"], "input")
            )
            if text:
                turn["reasoning_content"].append(text)
