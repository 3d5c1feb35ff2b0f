"""Request bodies of the Messages API, and their content blocks as chat-template messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StrictBool, StrictInt, StrictStr, ValidationError

from modelpack_engine.errors import RequestError
from modelpack_server.api.bodies import Body, SparseBody, object_schema
from modelpack_server.api.continuation import carried
from modelpack_server.conversation.pictures import PDF, PictureReader
from modelpack_server.tool_parsers.parts import Tool, ToolChoice, check_names


class ToolFields(Body):
    """A tool that the client runs."""

    type: Literal["custom"] | None = None
    name: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
    description: StrictStr | None = None
    input_schema: Annotated[dict[str, Any], AfterValidator(object_schema)]
    strict: StrictBool | None = None


class ChoiceFields(Body):
    """The `tool_choice` field: whether the model calls a tool, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: StrictStr | None = None
    disable_parallel_tool_use: StrictBool = False


def tools_of(
    given: Sequence[dict[str, Any]], choice: ChoiceFields | None
) -> tuple[tuple[Tool, ...], ToolChoice]:
    """Return the tools and the tool choice of a request.

    Raises `RequestError` for tools that only Anthropic's servers can run, and for a choice that
    names an unknown tool.
    """
    tools = tuple(_tool(fields, i) for i, fields in enumerate(given))
    check_names(tools)
    known = {tool.name for tool in tools}
    if choice is None or choice.type == "auto":
        return tools, ToolChoice()
    if choice.type == "none":
        return tools, ToolChoice("none")
    if not tools:
        raise RequestError("tool_choice requires a call, but tools is empty", param="tools")
    if choice.type == "any":
        return tools, ToolChoice("required")
    if choice.name not in known:
        raise RequestError(
            f"tool_choice names {choice.name!r}, which is not in tools", param="tool_choice.name"
        )
    return tools, ToolChoice("required", (choice.name,))


def _tool(given: dict[str, Any], index: int) -> Tool:
    kind = given.get("type")
    if kind not in (None, "custom"):
        raise RequestError(
            f"tools.{index}: tools of type {kind!r} run only on Anthropic's servers",
            param=f"tools.{index}.type",
            hint="offer tools with a name and an input_schema",
        )
    try:
        fields = ToolFields.model_validate({k: v for k, v in given.items() if v is not None})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["tools", str(index), *map(str, first["loc"])])
        raise RequestError(f"{where}: {first['msg']}", param=where) from None
    return Tool(fields.name, fields.description or "", fields.input_schema, bool(fields.strict))


_Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)]


class MessageFields(SparseBody):
    """A message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: StrictStr | list[dict[str, Any]]


class ThinkingFields(SparseBody):
    """The `thinking` field: whether the model reasons before its reply."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    display: Literal["summarized", "omitted"] = "summarized"


class FormatFields(SparseBody):
    """The format of the reply's text."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputFields(SparseBody):
    """The `output_config` field."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: FormatFields | None = None


class PromptRequest(SparseBody):
    """The fields that determine the prompt: the body of POST /v1/messages/count_tokens."""

    model: Annotated[StrictStr, Field(min_length=1)]
    messages: Annotated[list[MessageFields], Field(min_length=1)]
    system: StrictStr | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: ChoiceFields | None = None
    thinking: ThinkingFields | None = None
    output_config: OutputFields | None = None
    output_format: FormatFields | None = None  # the old name of output_config.format


class MessagesRequest(PromptRequest):
    """The body of POST /v1/messages."""

    max_tokens: Annotated[StrictInt, Field(ge=1)]
    stream: StrictBool = False
    stop_sequences: list[Annotated[StrictStr, Field(min_length=1)]] = []
    temperature: _Fraction | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False, strict=True)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0)] | None = None
    preset: StrictStr | None = None
    keep_alive: StrictStr | StrictInt | float | None = None

    def check(self) -> None:
        """Raise `RequestError` for fields that contradict each other."""
        if self.thinking is None or self.thinking.type != "enabled":
            return
        if self.thinking.budget_tokens is None:
            raise RequestError("thinking.budget_tokens is required", param="thinking.budget_tokens")
        if self.thinking.budget_tokens >= self.max_tokens:
            raise RequestError(
                "thinking.budget_tokens must be less than max_tokens",
                param="thinking.budget_tokens",
            )

    def given(self) -> dict[str, Any]:
        """Return the fields of `SamplingParams` that the request sets."""
        found = self.model_dump(include={"temperature", "top_p", "top_k"}, exclude_none=True)
        if self.stop_sequences:
            found["stop"] = tuple(self.stop_sequences)
        return found


# Claude Code puts this line before its instructions, with a different number in each request.
_BILLING = "x-anthropic-billing-header:"


def system_text(system: str | Sequence[Mapping[str, Any]] | None) -> str:
    """Return the instructions without Claude Code's billing line.

    The line differs in each request: with it, no prompt would ever match the prefix cache.
    """
    if system is None or isinstance(system, str):
        return _without_billing(system or "")
    texts = []
    for i, block in enumerate(system):
        if block.get("type") != "text":
            raise unknown_block(block, f"system.{i}")
        texts.append(_without_billing(text_of(block, "text", f"system.{i}")))
    return "\n\n".join(text for text in texts if text)


def _without_billing(text: str) -> str:
    if not text.startswith(_BILLING):
        return text
    return text.partition("\n")[2].lstrip("\n")


def plain_text(
    content: str | Sequence[Any] | None,
    where: str,
    show: Callable[[Mapping[str, Any], str], str] | None = None,
) -> str:
    """Return the text of content; `where` names it in errors.

    `show` returns the text of a block, by default that of one which is a text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for i, block in enumerate(content):
        place = f"{where}.{i}"
        if not isinstance(block, Mapping):
            raise RequestError(f"{place}: expected an object", param=place)
        texts.append((show or shown)(block, place))
    return "\n\n".join(text for text in texts if text)


def shown(block: Mapping[str, Any], where: str) -> str:
    """Return the text of a block: a text, a text document or a search result.

    Raises `RequestError` with the block's type for any other block.
    """
    match block.get("type"):
        case "text":
            return text_of(block, "text", where)
        case "document":
            return _document(block, where)
        case "search_result":
            head = [str(block[key]) for key in ("title", "source") if block.get(key)]
            return "\n".join([*head, plain_text(block.get("content"), f"{where}.content")])
    raise unknown_block(block, where)


def _document(block: Mapping[str, Any], where: str) -> str:
    source = block.get("source")
    kind = source.get("type") if isinstance(source, Mapping) else None
    if not isinstance(source, Mapping) or kind not in ("text", "content"):
        raise RequestError(
            f"{where}: documents have a source of type text or content, or base64 where the model"
            f" reads pictures, not {kind!r}",
            param=where,
        )
    if kind == "text":
        text = text_of(source, "data", f"{where}.source")
    else:
        text = plain_text(source.get("content"), f"{where}.source.content")
    head = [str(block[key]) for key in ("title", "context") if block.get(key)]
    return "\n".join([*head, text])


def text_of(block: Mapping[str, Any], key: str, where: str) -> str:
    """Return a field that must be a string; raises `RequestError` if it is not."""
    text = block.get(key)
    if not isinstance(text, str):
        raise RequestError(f"{where}.{key} is not a string", param=f"{where}.{key}")
    return text


def unknown_block(block: Mapping[str, Any], where: str) -> RequestError:
    """Return the error for a block that cannot become part of the prompt."""
    return RequestError(
        f"{where}: blocks of type {block.get('type')!r} are not supported here", param=where
    )


def template_messages(
    system: str | Sequence[Mapping[str, Any]] | None,
    messages: Sequence[MessageFields],
    pictures: PictureReader | None = None,
) -> list[dict[str, Any]]:
    """Return the conversation in the form that chat templates expect.

    Tool results become messages of their own, before the text of the same turn, which their images
    begin: templates show texts of tools only. A turn with images has a list of parts; without
    `pictures`, images are refused. Raises `RequestError` with the name of the block that cannot
    become part of the prompt.
    """
    turns: list[dict[str, Any]] = []
    if instructions := system_text(system):
        turns.append({"role": "system", "content": instructions})
    for i, message in enumerate(messages):
        where = f"messages.{i}.content"
        if isinstance(message.content, str):
            turns.append({"role": message.role, "content": message.content})
        elif message.role == "user":
            turns += _user(message.content, where, pictures)
        elif message.role == "assistant":
            turns.append(_assistant(message.content, where))
        else:
            turns.append({"role": "system", "content": system_text(message.content)})
    return turns


def _user(
    blocks: Sequence[Mapping[str, Any]], where: str, pictures: PictureReader | None
) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    found: list[str | list[dict[str, Any]]] = []  # images of tool results
    contents: list[str | list[dict[str, Any]]] = []
    for i, block in enumerate(blocks):
        place = f"{where}.{i}"
        if block.get("type") == "tool_result":
            results.append(_result(block, place, pictures, found))
        elif block.get("type") == "image" and pictures is not None:
            contents.append([_image(block, place, pictures)])
        elif pictures is not None and _source_of(block).get("type") == "base64":
            contents.append(_pages(block, place, pictures))
        else:
            contents.append(shown(block, place))
    contents = found + contents
    if contents or not results:
        results.append({"role": "user", "content": _joined(contents)})
    return results


def _joined(contents: Sequence[str | list[dict[str, Any]]]) -> str | list[dict[str, Any]]:
    """Return blocks as one content: an empty line between texts, none beside a picture.

    The other APIs have none there, and models were trained without.
    """
    parts: list[dict[str, Any]] = []
    for is_text, blocks in groupby(contents, lambda content: isinstance(content, str)):
        if is_text:
            text = "\n\n".join(map(str, blocks))
            parts.append({"type": "text", "text": text})
        else:
            parts += [part for block in blocks for part in block if isinstance(part, dict)]
    if all(isinstance(content, str) for content in contents):
        return str(parts[0]["text"]) if parts else ""
    return parts


def _image(block: Mapping[str, Any], where: str, pictures: PictureReader) -> dict[str, Any]:
    source = block.get("source")
    kind = source.get("type") if isinstance(source, Mapping) else None
    if isinstance(source, Mapping) and kind == "base64":
        return pictures.base64(source.get("data"), where)
    if isinstance(source, Mapping) and kind == "url":
        return pictures.url(source.get("url"), where)
    raise RequestError(f"{where}: images have a source of type base64, not {kind!r}", param=where)


def _source_of(block: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the source of a document."""
    source = block.get("source") if block.get("type") == "document" else None
    return source if isinstance(source, Mapping) else {}


def _pages(block: Mapping[str, Any], where: str, pictures: PictureReader) -> list[dict[str, Any]]:
    """Return the parts of a PDF with its title and context."""
    source = _source_of(block)
    if source.get("media_type") != PDF:
        raise RequestError(
            f"{where}: documents in base64 have the media_type {PDF},"
            f" not {source.get('media_type')!r}",
            param=where,
        )
    head = "\n".join(str(block[key]) for key in ("title", "context") if block.get(key))
    text = [{"type": "text", "text": f"{head}\n"}] if head else []
    return [*text, pictures.document(source.get("data"), where)]


def _result(
    block: Mapping[str, Any],
    where: str,
    pictures: PictureReader | None,
    found: list[str | list[dict[str, Any]]],
) -> dict[str, Any]:
    """Return the message of a tool's result, and add its images to `found`."""
    content = block.get("content")
    if content is not None and not isinstance(content, (str, list)):
        raise RequestError(f"{where}.content is neither a string nor a list of blocks", param=where)

    def show(part: Mapping[str, Any], place: str) -> str:
        if pictures is None or part.get("type") != "image":
            return shown(part, place)
        found.append([_image(part, place, pictures)])
        return ""

    text = plain_text(content, f"{where}.content", show)
    if block.get("is_error") is True:
        text = f"Error: {text}"
    call = text_of(block, "tool_use_id", where)
    return {"role": "tool", "tool_call_id": call, "content": text}


def _assistant(blocks: Sequence[Mapping[str, Any]], where: str) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for i, block in enumerate(blocks):
        place = f"{where}.{i}"
        match block.get("type"):
            case "text":
                texts.append(text_of(block, "text", place))
            case "thinking":
                thought = text_of(block, "thinking", place) or carried(block.get("signature"))
                thoughts.append(thought or "")
            case "redacted_thinking":
                pass  # encrypted by Anthropic; this server cannot read it
            case "tool_use":
                calls.append(_call(block, place))
            case _:
                raise unknown_block(block, place)
    turn: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if calls:
        turn["tool_calls"] = calls
    if any(thoughts):
        turn["reasoning_content"] = "\n\n".join(thought for thought in thoughts if thought)
    return turn


def _call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    given = block.get("input")
    if not isinstance(given, dict):
        raise RequestError(f"{where}.input is not an object", param=f"{where}.input")
    function = {
        "name": text_of(block, "name", where),
        "arguments": json.dumps(given, ensure_ascii=False),
    }
    return {"id": text_of(block, "id", where), "type": "function", "function": function}
