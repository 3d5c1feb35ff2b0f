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
    """A chat request, independent of any API.

    `messages` have the form that chat templates expect: `role`, `content` as text (or as a list of
    parts with those of `PictureReader`, where the model has vision), and optionally
    `tool_calls` (`{"id", "type", "function": {"name", "arguments"}}`, with the arguments as JSON
    text), `tool_call_id` and `reasoning_content`. `max_tokens` limits the reply, which otherwise
    may fill the context; `params.max_tokens` is ignored. `constraint` applies to the text outside
    of reasoning. `template_options` are variables of the template. `reasoning` switches
    reasoning on or off if the model supports that (None: the model's default), and
    `reasoning_budget` limits its tokens. With `continues`, the last message is the beginning of the
    reply. `template` replaces the model's chat template, and `earlier` are the token ids of turns
    before this one.
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
    """Token counts of one choice; its completion tokens include `reasoning_tokens`."""

    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """New parts of one choice, and its finish reason if it has ended.

    `stop_sequence` is the stop string that ended it, if any. Only the last delta has `usage` and
    `timing`.
    """

    index: int
    parts: tuple[Part, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish: Finish | None = None
    stop_sequence: str | None = None
    usage: ChatUsage | None = None
    timing: Timing | None = None
