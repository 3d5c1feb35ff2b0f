"""Prompts from messages and tools, and for filling in the middle of a text.

`render` applies the chat template; for a template without tool support it describes the tools in
the words and the markup on which Hermes and Qwen models were trained, which work best for other
models too.

`fit_turns` arranges messages as templates accept them. Newer clients add instructions after the
user's turns. Moving them to the front would change the beginning of each prompt, which then would
not match the prefix cache. So they stay in place, as a system message if the template shows one
there, otherwise within the user's turn.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelpack_engine.errors import RequestError
from modelpack_engine.models.chat_template import ChatTemplate
from modelpack_engine.models.tokenizer import Tokenizer
from modelpack_server.conversation.pictures import joined_content
from modelpack_server.conversation.spec import ChatSpec
from modelpack_server.tool_parsers.families import OutputFormat, starts_reasoning
from modelpack_server.tool_parsers.history import template_messages
from modelpack_server.tool_parsers.json_text import load_object
from modelpack_server.tool_parsers.parts import Tool, described

_MARK = "0d9b4e1c"


def fit_turns(
    messages: Sequence[Mapping[str, Any]], chat_template: str | None
) -> list[dict[str, Any]]:
    """Return `messages` in an order and with roles that `chat_template` shows.

    Consecutive messages of one role become one message, except tool results and messages after
    calls.
    """
    shown_first, shown_within = _shows_system(chat_template or "")
    turns: list[list[dict[str, Any]]] = []  # the messages of each turn
    has_text = False  # whether the last turn has text
    for message in messages:
        part = dict(message)
        first = not turns or (len(turns) == 1 and turns[0][0]["role"] == "system")
        if part["role"] == "system" and not (shown_first if first else shown_within):
            text = f"<system-reminder>\n{part['content']}\n</system-reminder>"
            part = {"role": "user", "content": text}
        if turns and _is_same_turn(turns[-1][-1], part, has_text=has_text):
            turns[-1].append(part)
        else:
            turns.append([part])
            has_text = False
        has_text = has_text or bool(part.get("content"))
    return [turn[0] if len(turn) == 1 else _joined(turn) for turn in turns]


def _is_same_turn(last: Mapping[str, Any], other: Mapping[str, Any], *, has_text: bool) -> bool:
    """Return whether `other` belongs to the turn whose last message is `last`."""
    return (
        last["role"] == other["role"]
        and last["role"] != "tool"
        and not last.get("tool_calls")
        and not (has_text and other.get("reasoning_content"))
    )


def _joined(turn: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the messages of a turn into one, in linear time."""
    texts = [part["content"] for part in turn if part.get("content")]
    thoughts = [part["reasoning_content"] for part in turn if part.get("reasoning_content")]
    joined = {key: value for part in turn for key, value in part.items()}
    joined["content"] = joined_content(texts)
    return joined | ({"reasoning_content": "\n\n".join(thoughts)} if thoughts else {})


@functools.lru_cache(maxsize=64)
def _shows_system(chat_template: str) -> tuple[bool, bool]:
    """Return whether a template shows system messages at the beginning, and later ones in place.

    It renders examples: templates reject, drop or move messages that they do not expect.
    """
    system, user = f"{_MARK}-s", f"{_MARK}-u"
    answer, more = f"{_MARK}-a", f"{_MARK}-v"
    turns = [("user", user), ("assistant", answer), ("user", more)]
    first = _places(chat_template, [("system", system), *turns], [system, user, answer, more])
    within = _places(
        chat_template, [turns[0], ("system", system), *turns[1:]], [user, system, answer, more]
    )
    return first, within


def _places(chat_template: str, turns: list[tuple[str, str]], expected: list[str]) -> bool:
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = ChatTemplate(chat_template).render(
            {"messages": messages, "tools": None, "documents": None, "bos_token": "",
             "eos_token": "", "add_generation_prompt": True}
        )  # fmt: skip
    except RequestError:
        return False
    places = [text.find(part) for part in expected]
    return -1 not in places and places == sorted(places)


#: The family whose markup the description of the tools requests.
PLAIN_FAMILY = "hermes"

_ASK = """\
You may call one or more functions to assist with the user query. They are, each a line of JSON:
<tools>
{tools}
</tools>
For each call, answer with its name and arguments as JSON within <tool_call></tool_call> tags:
<tool_call>
{{"name": "the function", "arguments": {{"the argument": "its value"}}}}
</tool_call>"""
# Small models repeat a result, or the call, without an instruction to use the result.
_RESULT = """\
The function returned this result. Answer me with it, in plain words, unless you need another \
function.
<tool_response>
{result}
</tool_response>"""


def describe_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]
) -> list[dict[str, Any]]:
    """Return messages with the tools, earlier calls and results as plain text."""
    plain = [_without_calls(message) for message in messages]
    if not tools:
        return plain
    lines = [
        json.dumps({"name": tool.name, "description": tool.description,
                    "parameters": dict(tool.parameters)}, ensure_ascii=False)
        for tool in tools
    ]  # fmt: skip
    text = _ASK.format(tools="\n".join(lines))
    if plain and plain[0].get("role") == "system":
        first = plain[0]
        return [{**first, "content": f"{first.get('content') or ''}\n\n{text}"}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _without_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with its calls or its result as text."""
    changed = dict(message)
    if message.get("role") == "tool":
        return {"role": "user", "content": _RESULT.format(result=message.get("content") or "")}
    calls = changed.pop("tool_calls", None)
    if calls:
        texts = [str(message["content"])] if message.get("content") else []
        texts += [_call(call["function"]) for call in calls]
        changed["content"] = "\n".join(texts)
    return changed


def _call(function: Mapping[str, Any]) -> str:
    arguments = function.get("arguments") or "{}"
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    name = json.dumps(function.get("name", ""), ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {text}}}\n</tool_call>'


_TAKES_TOOL_ROLE = re.compile(r"""role['"]?\]?\s*[!=]=\s*['"]tool['"]""")


@functools.lru_cache(maxsize=64)
def wants_results_with_calls(chat_template: str) -> bool:
    """Return whether a template reads `tool_responses` and ignores messages with role `tool`."""
    return "tool_responses" in chat_template and not _TAKES_TOOL_ROLE.search(chat_template)


def results_with_calls(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return `messages` with each tool result in the message that has the call.

    Text before a call becomes a separate turn before it. Text after the results joins their
    message, where such templates expect it.
    """
    changed: list[dict[str, Any]] = []
    names: dict[Any, str] = {}  # tool names of the last turn's calls, by call id
    for message in messages:
        turn = dict(message)
        last = changed[-1] if changed else {}
        calls = last.get("tool_calls")
        if turn.get("role") == "tool" and calls:
            last.setdefault("tool_responses", []).append(_result(turn, names))
            continue
        if turn.get("tool_calls") and turn.get("content"):
            changed.append({**turn, "tool_calls": None})
            turn["content"] = ""
        elif _goes_on(last, turn):
            last["content"] = turn.get("content")
            continue
        changed.append(turn)
        names = {c.get("id"): c["function"]["name"] for c in turn.get("tool_calls") or ()}
    return changed


def _goes_on(last: Mapping[str, Any], turn: Mapping[str, Any]) -> bool:
    """Return whether `turn` is the assistant's text after the results in `last`."""
    has_results = bool(last.get("tool_responses")) and not last.get("content")
    return has_results and turn.get("role") == "assistant" and not turn.get("tool_calls")


def _result(message: Mapping[str, Any], names: Mapping[Any, str]) -> dict[str, Any]:
    name = names.get(message.get("tool_call_id")) or message.get("name") or "unknown"
    text = str(message.get("content") or "")
    try:
        return {"name": name, "response": load_object(text)}
    except ValueError:
        return {"name": name, "response": text}


def render(spec: ChatSpec, tokenizer: Tokenizer, written: OutputFormat) -> str:
    """Return the prompt text of a conversation; `written` is the model's output format.

    The prompt has the tools unless the tool choice is "none"; for a template without tool support
    they are text. Raises `RequestError`, with "template" in its text, if the template fails.
    """
    options = dict(spec.template_options)
    if spec.reasoning is not None:  # the names of this switch in templates
        options.setdefault("enable_thinking", spec.reasoning)
        options.setdefault("thinking", spec.reasoning)
    template = spec.template or tokenizer.chat_template
    tools = spec.tools if spec.tool_choice.mode != "none" else ()
    messages: Sequence[Mapping[str, Any]] = spec.messages
    begun = ""
    if spec.continues:
        begun, messages = str(messages[-1].get("content") or ""), messages[:-1]
    if written.family is None and template is not None:
        messages = describe_tools(messages, tools)
        tools = ()
    turns = template_messages(messages, written, template)
    if template is not None and wants_results_with_calls(template):
        turns = results_with_calls(turns)
    text = tokenizer.render_chat(
        turns,
        tools=[described(tool) for tool in tools] or None,
        add_generation_prompt=options.pop("add_generation_prompt", True),
        template=ChatTemplate(spec.template) if spec.template is not None else None,
        variables=options,  # a dict, since clients choose the names, which may equal our parameters
    )
    if not spec.continues:
        return text
    if written.reasoning is not None and starts_reasoning(written, text):
        text += f"{written.reasoning.closing}\n\n"  # the text to continue is not reasoning
    return text + begun


@dataclass(frozen=True, slots=True)
class Markers:
    """The tokens before the beginning, the end and the middle of a text, for filling it in.

    Each family of models has its own tokens. Source: model cards and tokenizers. With `end_first`,
    the end of the text comes before its beginning.
    """

    before_beginning: str
    before_end: str
    before_middle: str | None
    end_first: bool = False

    @property
    def tokens(self) -> tuple[str, ...]:
        """The markers that the family has."""
        found = (self.before_beginning, self.before_end, self.before_middle)
        return tuple(token for token in found if token is not None)


_FAMILIES = (
    Markers("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    Markers("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    Markers("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    Markers("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    Markers("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    Markers("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    Markers("[PREFIX]", "[SUFFIX]", None, end_first=True),  # Codestral
)


def may_infill(vocabulary: bytes) -> bool:
    """Return whether the bytes of a vocabulary contain the markers of a family."""
    return any(all(token.encode() in vocabulary for token in m.tokens) for m in _FAMILIES)


def find_markers(tokenizer: Tokenizer) -> Markers | None:
    """Return the markers in a model's vocabulary; None if it cannot fill in the middle."""
    for markers in _FAMILIES:
        if all(tokenizer.token_id(token) is not None for token in markers.tokens):
            return markers
    return None


def infilling_prompt(tokenizer: Tokenizer, markers: Markers, beginning: str, end: str) -> list[int]:
    """Return the prompt after which a model generates the text between two texts.

    DeepSeek's `before_end` token marks the position of the middle, which is the same place.
    """

    def marker(text: str | None) -> list[int]:
        found = None if text is None else tokenizer.token_id(text)
        return [] if found is None else [found]

    def plain(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, parse_special=False)

    parts = [
        marker(markers.before_beginning) + plain(beginning),
        marker(markers.before_end) + plain(end),
    ]
    if markers.end_first:
        parts.reverse()
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    return [*start, *parts[0], *parts[1], *marker(markers.before_middle)]
