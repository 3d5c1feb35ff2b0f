"""ChatSpec and ChatDelta: a chat request and its response, independent of any API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from modelpack_engine.outputs import Timing, TokenLogprob, Usage
from modelpack_engine.request import SamplingParams
from modelpack_server.structured_output import Constraint
from modelpack_server.tool_parsers.parts import Part, Tool, ToolChoice

Finish = Literal["stop", "length", "tool_calls", "abort"]


@dataclass(frozen=True, slots=True)
class ChatSpec:
    """A conversation that is to be continued.

    `messages` are as chat templates take them: `role`, `content` as text, and where there are any
    `tool_calls` (`{"id", "type", "function": {"name", "arguments"}}`, the arguments being the text
    of a JSON object), `tool_call_id`, `reasoning_content`. The answer takes `max_tokens` at most,
    or what the context holds; `params.max_tokens` counts for nothing. `constraint` is what the text
    outside of reasoning keeps to. `template_options` are variables of the template; `reasoning`
    switches thinking on or off where the model knows how (None: as it likes), and
    `reasoning_budget` is the most tokens of it. With `continues` the last message is the beginning
    of the answer, which goes on from there. `template` takes the place of the model's own chat
    template, and `earlier` are token ids of turns before this one.
    """

    messages: Sequence[dict[str, Any]]
    params: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    n: int = 1
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    parallel_tool_calls: bool = True
    constraint: Constraint | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    reasoning: bool | None = None
    reasoning_budget: int | None = None
    continues: bool = False
    template: str | None = None
    earlier: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class ChatUsage(Usage):
    """Token counts of one choice; `reasoning_tokens` of its completion tokens were thinking."""

    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """What is new of one choice: parts of its answer, and perhaps its end.

    `stop_sequence` is the stop string that ended it, if one did. `usage` and `timing` come with the
    end.
    """

    index: int
    parts: tuple[Part, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish: Finish | None = None
    stop_sequence: str | None = None
    usage: ChatUsage | None = None
    timing: Timing | None = None
