"""From a conversation to a prompt, by the model's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelpack_engine.loaders.chat_template import ChatTemplate
from modelpack_engine.loaders.tokenizer import Tokenizer
from modelpack_server.conversation.plain_tools import describe_tools
from modelpack_server.conversation.spec import ChatSpec
from modelpack_server.conversation.tool_results import results_with_calls, wants_results_with_calls
from modelpack_server.tool_parsers.formats import OutputFormat, starts_reasoning
from modelpack_server.tool_parsers.history import template_messages
from modelpack_server.tool_parsers.tools import Tool

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
