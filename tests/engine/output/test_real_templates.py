"""Chat templates that come with models and with mlx-lm."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest

from modelpack.formats.gguf import read_gguf_header
from modelpack.testing import weights
from modelpack_server.tool_parsers.families import OutputFormat, find_format, starts_reasoning
from tests.engine.output.reading import call, read, text, thought


@pytest.mark.weights
def test_smollm2_has_no_format() -> None:
    header = read_gguf_header(weights.smollm2_gguf())
    template = header.metadata["tokenizer.chat_template"].value
    assert isinstance(template, str)
    assert "<|im_start|>" in template
    assert find_format(template, model_type="llama") == OutputFormat()


def test_what_mlx_lm_shows_deepseek_v32_of_a_call_is_read_as_this_call() -> None:
    """Its template is Python, so the model's type names the format."""
    template: Any = importlib.import_module("mlx_lm.chat_templates.deepseek_v32")
    format = find_format(None, model_type="deepseek_v32")  # noqa: A001
    arguments = {"city": "São <b> Paulo", "days": 3, "where": {"a": [1, None]}, "note": "12"}
    user = {"role": "user", "content": "hi"}
    function = {"name": "get_weather", "arguments": json.dumps(arguments)}
    answer = {
        "role": "assistant",
        "content": "Let me see.",
        "reasoning_content": "Hm.",
        "tool_calls": [{"id": "1", "type": "function", "function": function}],
    }
    prompt = template.apply_chat_template([user], enable_thinking=True, add_generation_prompt=True)
    assert starts_reasoning(format, prompt)
    whole = template.apply_chat_template([user, answer], enable_thinking=True)
    assert whole.startswith(prompt)
    found = read(format, [whole.removeprefix(prompt)], starts_reasoning=True)
    assert found == [thought("Hm."), text("Let me see."), call("get_weather", **arguments)]
    plain = template.apply_chat_template([user], enable_thinking=False, add_generation_prompt=True)
    assert not starts_reasoning(format, plain)
