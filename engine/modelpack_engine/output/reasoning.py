"""The markers around what a model thinks before it answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    """`opening` and `closing` enclose reasoning; `dropped` are markers that mean nothing.

    `anywhere`: the opening is a special token, which no model writes by accident, so it counts
    wherever it stands. Otherwise it counts only where a block can begin: at the beginning, after
    another block, and after calls. A model that explains the tag in its answer keeps it.
    """

    opening: str
    closing: str
    anywhere: bool = False
    dropped: tuple[str, ...] = ()


THINK = ReasoningMarkers("<think>", "</think>")
GLM = ReasoningMarkers("<think>", "</think>", dropped=("<|begin_of_box|>", "<|end_of_box|>"))
MISTRAL = ReasoningMarkers("[THINK]", "[/THINK]", anywhere=True)
GEMMA = ReasoningMarkers(
    "<|channel>thought",
    "<channel|>",
    anywhere=True,
    dropped=("<|channel>response\n", "<|channel>final\n", "<|channel>response", "<channel|>"),
)
LONGCAT = ReasoningMarkers("<longcat_think>", "</longcat_think>")
SEED = ReasoningMarkers("<seed:think>", "</seed:think>")
HARMONY = ReasoningMarkers("<|channel|>analysis<|message|>", "<|end|>", anywhere=True)
