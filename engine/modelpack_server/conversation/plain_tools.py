"""Tools for models whose chat template knows nothing of them: described in plain text.

The words and the markup are those that Hermes and Qwen models were trained on, which other models
follow best as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from modelpack_server.tool_parsers.tools import Tool

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
