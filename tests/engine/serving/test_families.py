"""The outputs of all families of models in the API, streamed by character or not."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import pytest

from modelpack_engine.models.chat_template import ChatTemplate
from modelpack_server.tool_parsers.families import FAMILIES
from tests.engine.output.cases import CASES
from tests.engine.output.reading import TOOLS
from tests.engine.output.test_formats import TEMPLATES
from tests.engine.output.writing import Case
from tests.engine.serving.conftest import Scripted
from tests.engine.serving.test_chat_api import deltas
from tests.engine.serving.tiny import TEMPLATE

_SHOWN = {family: piece for family, piece, _ in reversed(TEMPLATES)}
_TOOLS = [
    {"type": "function", "function": {"name": t.name, "parameters": dict(t.parameters)}}
    for t in TOOLS
]


def _calls(case: Case) -> list[Any]:
    return [part for part in case.found if part[0] == "call"]


# The first outputs of each family that contain calls.
_CHOSEN = [
    case
    for family in FAMILIES
    for case in [case for case in CASES if case.family == family and _calls(case)][:3]
]


@pytest.mark.long
@pytest.mark.parametrize("case", _CHOSEN, ids=lambda case: f"{case.family}-{case.name}")
def test_calls(api: Scripted, case: Case) -> None:
    """A model whose family the server detects only from its template."""
    shown = f"{{% if false %}}{{% raw %}}{_SHOWN[case.family]}{{% endraw %}}{{% endif %}}"
    api.engine.tokenizer._chat_template = ChatTemplate(shown + TEMPLATE)
    whole = _whole(api.chat(case.written, tools=_TOOLS).json()["choices"][0])
    streamed = _streamed(api, case)
    assert whole == streamed
    assert whole["calls"] == [(name, arguments) for _, name, arguments in _calls(case)]
    assert whole["content"] == "".join(part[1] for part in case.found if part[0] == "text")
    assert whole["reasoning"] == "".join(part[1] for part in case.found if part[0] == "thought")
    assert whole["finish"] == "tool_calls"


def _whole(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice["message"]
    functions = [call["function"] for call in message["tool_calls"]]
    assert len({call["id"] for call in message["tool_calls"]}) == len(functions)
    return {
        "calls": [(f["name"], json.loads(f["arguments"])) for f in functions],
        "content": message["content"] or "",
        "reasoning": message.get("reasoning_content") or "",
        "finish": choice["finish_reason"],
    }


def _streamed(api: Scripted, case: Case) -> dict[str, Any]:
    choices = deltas(api.chat(*case.written, tools=_TOOLS, stream=True, max_tokens=4000))
    texts: dict[str, str] = defaultdict(str)
    names: dict[int, str] = {}
    arguments: dict[int, str] = defaultdict(str)
    for choice in choices:
        for name in ("content", "reasoning_content"):
            texts[name] += choice["delta"].get(name) or ""
        for call in choice["delta"].get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(names)
                names[call["index"]] = call["function"]["name"]
            arguments[call["index"]] += call["function"]["arguments"]
    return {
        "calls": [(names[index], json.loads(arguments[index])) for index in sorted(names)],
        "content": texts["content"],
        "reasoning": texts["reasoning_content"],
        "finish": choices[-1]["finish_reason"],
    }
