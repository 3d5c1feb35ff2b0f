"""OutputFormat: how a model writes calls and reasoning."""

from __future__ import annotations

from dataclasses import dataclass, replace

from modelpack.errors import UsageError
from modelpack_server.tool_parsers.families import FAMILIES
from modelpack_server.tool_parsers.reasoning import (
    GEMMA,
    HARMONY,
    KIMI_K3,
    LONGCAT,
    MISTRAL,
    THINK,
    ReasoningMarkers,
)


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """How a model writes calls (`family`, a name of `FAMILIES`) and reasoning; None: it does not.

    `keeps_special_tokens`: the markers may be special tokens, so that the engine must not leave
    those out of the text (`SamplingParams.skip_special_tokens`); the parser takes them out.
    """

    family: str | None = None
    reasoning: ReasoningMarkers | None = None

    @property
    def keeps_special_tokens(self) -> bool:
        special = self.family is not None and FAMILIES[self.family].special_tokens
        return special or (self.reasoning is not None and self.reasoning.anywhere)

    @classmethod
    def named(cls, family: str, *, reasoning: ReasoningMarkers | None = THINK) -> OutputFormat:
        """Return the format of this name, for a template that does not show it.

        Raises `UsageError` with the names there are.
        """
        if family not in FAMILIES:
            raise UsageError(
                f"there is no tool-call format named {family!r}",
                hint=f"one of {', '.join(sorted(FAMILIES))}",
            )
        return cls(family, _REASONING_OF.get(family, reasoning))

    def without_reasoning(self) -> OutputFormat:
        """Return the format of an answer for which thinking was switched off.

        Harmony keeps its channels: without them nothing of it can be read.
        """
        return self if self.family == "harmony" else replace(self, reasoning=None)


_REASONING_OF = {
    "harmony": HARMONY,
    "gemma4": GEMMA,
    "mistral": MISTRAL,
    "mistral_v11": MISTRAL,
    "mistral_v13": MISTRAL,
    "kimi_k3": KIMI_K3,
    "longcat": LONGCAT,
}
