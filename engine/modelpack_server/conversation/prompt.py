"""Prompts from messages and tools, including tools for templates that do not support them.

Tools are described in the words and the markup that Hermes and Qwen models were trained on, which
other models follow best as well.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from modelpack_engine.models.chat_template import ChatTemplate
from modelpack_engine.models.tokenizer import Tokenizer
from modelpack_server.conversation.spec import ChatSpec
from modelpack_server.tool_parsers.formats import OutputFormat, starts_reasoning
from modelpack_server.tool_parsers.history import template_messages
from modelpack_server.tool_parsers.json_text import load_object
from modelpack_server.tool_parsers.parts import Tool

#: The family whose markup is asked for.
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
# Small models repeat a result, or the call, unless they are told what it is for.
_RESULT = """\
The function returned this result. Answer me with it, in plain words, unless you need another \
function.
<tool_response>
{result}
</tool_response>"""


def describe_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]
) -> list[dict[str, Any]]:
    """Return messages that say in plain text what the tools are, and what was called before."""
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
    """Return a message as one that has nothing but text."""
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
    """Tell whether a template reads `tool_responses`, and knows no messages of tools."""
    return "tool_responses" in chat_template and not _TAKES_TOOL_ROLE.search(chat_template)


def results_with_calls(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return `messages` with every tool's result in the message that called it.

    What was said before a call becomes a turn before it, and what was said after the results goes
    with them, which is where such a template puts it.
    """
    changed: list[dict[str, Any]] = []
    names: dict[Any, str] = {}  # of the calls in the last turn, by their ids
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
    """Tell whether `turn` is what the assistant says after the results in `last`."""
    has_results = bool(last.get("tool_responses")) and not last.get("content")
    return has_results and turn.get("role") == "assistant" and not turn.get("tool_calls")


def _result(message: Mapping[str, Any], names: Mapping[Any, str]) -> dict[str, Any]:
    name = names.get(message.get("tool_call_id")) or message.get("name") or "unknown"
    text = str(message.get("content") or "")
    try:
        return {"name": name, "response": load_object(text)}
    except ValueError:
        return {"name": name, "response": text}


# Enough of a prompt's end to see whether it opens a block of reasoning.
_TAIL = 256


def render(spec: ChatSpec, tokenizer: Tokenizer, written: OutputFormat) -> str:
    """Return the prompt text of a conversation; `written` is how the model writes calls.

    Tools are shown unless none may be called; a template that knows nothing of tools gets them as
    text. Raises `RequestError`, whose text has the word "template", if the template fails.
    """
    options = dict(spec.template_options)
    if spec.reasoning is not None:  # what templates call the switch
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
        variables=options,  # clients name them: a name may be that of a parameter here
    )
    if not spec.continues:
        return text
    if written.reasoning is not None and starts_reasoning(written, text[-_TAIL:]):
        text += f"{written.reasoning.closing}\n\n"  # what was begun is the answer itself
    return text + begun


def described(tool: Tool) -> dict[str, Any]:
    """Return a tool as templates take it."""
    function = {"name": tool.name, "description": tool.description}
    return {"type": "function", "function": function | {"parameters": dict(tool.parameters)}}
