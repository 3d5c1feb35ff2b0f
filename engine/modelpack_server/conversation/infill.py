"""Fill in the middle: the prompt for text between a prefix and a suffix.

Each family of models was trained with tokens of its own. Source: their model cards and tokenizers.
"""

from __future__ import annotations

from dataclasses import dataclass

from modelpack_engine.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Markers:
    """What stands before the beginning, before the end, and before the middle, if anything does.

    With `end_first` the end of the text comes before its beginning.
    """

    before_beginning: str
    before_end: str
    before_middle: str | None
    end_first: bool = False

    @property
    def tokens(self) -> tuple[str, ...]:
        """All of them."""
        found = (self.before_beginning, self.before_end, self.before_middle)
        return tuple(token for token in found if token is not None)


_FAMILIES = (
    Markers("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    Markers("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    Markers("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    Markers("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    Markers("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    Markers("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    Markers("[PREFIX]", "[SUFFIX]", None, end_first=True),  # Codestral
)


def may_infill(vocabulary: bytes) -> bool:
    """Return whether a vocabulary, wherever it is written down, has the markers of a family."""
    return any(all(token.encode() in vocabulary for token in m.tokens) for m in _FAMILIES)


def find_markers(tokenizer: Tokenizer) -> Markers | None:
    """Return the markers that a model knows; None if it cannot fill in."""
    for markers in _FAMILIES:
        if all(tokenizer.token_id(token) is not None for token in markers.tokens):
            return markers
    return None


def infilling_prompt(tokenizer: Tokenizer, markers: Markers, beginning: str, end: str) -> list[int]:
    """Return the tokens after which a model writes what belongs between two texts.

    DeepSeek's token before the end stands where the middle belongs, which is the same place.
    """

    def marker(text: str | None) -> list[int]:
        found = None if text is None else tokenizer.token_id(text)
        return [] if found is None else [found]

    def plain(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, parse_special=False)

    parts = [
        marker(markers.before_beginning) + plain(beginning),
        marker(markers.before_end) + plain(end),
    ]
    if markers.end_first:
        parts.reverse()
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    return [*start, *parts[0], *parts[1], *marker(markers.before_middle)]
