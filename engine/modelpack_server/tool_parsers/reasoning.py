"""The markers around what a model thinks before it answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    """`opening` and `closing` enclose reasoning.

    `anywhere`: the opening is a special token, which no model writes by accident, so it counts
    wherever it stands. Otherwise it counts only where a block can begin: at the beginning, after
    another block, and after calls. A model that explains the tag in its answer keeps it.
    """

    opening: str
    closing: str
    anywhere: bool = False


THINK = ReasoningMarkers("<think>", "</think>")
MISTRAL = ReasoningMarkers("[THINK]", "[/THINK]", anywhere=True)
GEMMA = ReasoningMarkers("<|channel>thought", "<channel|>", anywhere=True)
KIMI_K3 = ReasoningMarkers("<|open|>think<|sep|>", "<|close|>think<|sep|>", anywhere=True)
LONGCAT = ReasoningMarkers("<longcat_think>", "</longcat_think>")
SEED = ReasoningMarkers("<seed:think>", "</seed:think>")
HARMONY = ReasoningMarkers("<|channel|>analysis<|message|>", "<|end|>", anywhere=True)
