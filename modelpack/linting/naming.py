"""Names of models in a catalogue: a pattern for the repository's last part and the tag."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from modelpack.config import ModelConfig
from modelpack.errors import FormatError
from modelpack.reference import Reference

# What each part may be. Names and tags are the registry's, so nothing here needs more letters.
_PARTS: Final = {
    "family": r"[a-z0-9]+(?:[._-][a-z0-9]+)*",
    "params": r"\d+(?:\.\d+)?(?:x\d+(?:\.\d+)?)?[KMBTkmbt](?:-[Aa]\d+(?:\.\d+)?[KMBTkmbt])?",
    "quant": r"[A-Za-z0-9]+(?:_[A-Za-z0-9]+)*",
    "context": r"\d+[KMkm]?",
    "variant": r"[A-Za-z0-9]+(?:[._][A-Za-z0-9]+)*",
    "version": r"v?\d+(?:\.\d+)*",
}
_PLACE = re.compile(r"<([a-z]+)>")
_CONTEXT = re.compile(r"(\d+)([KMkm]?)\Z")
_UNITS = {"": 1, "k": 1024, "m": 1024 * 1024}


@dataclass(frozen=True, slots=True)
class NamePattern:
    """`<family>:<params>-<quant>-<context>`, compiled."""

    text: str
    regex: re.Pattern[str]

    @classmethod
    def parse(cls, text: str, what: str) -> NamePattern:
        """Return the pattern; raise `FormatError` for a part that is not known or comes twice."""
        pieces, used, at = [], set(), 0
        for match in _PLACE.finditer(text):
            name = match[1]
            if name not in _PARTS or name in used:
                expected = ", ".join(f"<{part}>" for part in _PARTS)
                raise FormatError(f"name: {match[0]} is none of {expected}, once each", path=what)
            used.add(name)
            pieces += [re.escape(text[at : match.start()]), f"(?P<{name}>{_PARTS[name]})"]
            at = match.end()
        if text.count(":") != 1 or not used:
            raise FormatError(
                f"name is {text!r}, expected a pattern like <family>:<params>-<quant>", path=what
            )
        return cls(text, re.compile("".join(pieces) + re.escape(text[at:]) + r"\Z"))

    def problems(self, reference: Reference, config: ModelConfig) -> list[str]:
        """Return what is wrong with a name: its form, and what it says of the model."""
        name = f"{reference.repository.rpartition('/')[2]}:{reference.tag or ''}"
        match = self.regex.match(name)
        if match is None:
            return [f"{name} does not follow {self.text}"]
        said, found = match.groupdict(), []
        for part, fact in (("quant", config.quantization), ("params", config.parameters)):
            text = said.get(part)
            if text and fact and not _agree(part, text, fact):
                found.append(f"{name}: its {part} is {text}, and the config says {fact}")
        size = _tokens(said["context"]) if said.get("context") else None
        if size and config.context_size and not _about(size, config.context_size):
            found.append(f"{name}: its context is {size}, the config says {config.context_size}")
        return found


def _agree(part: str, said: str, fact: str) -> bool:
    if part == "quant":
        plain = [re.sub(r"[^a-z0-9]", "", text.lower()) for text in (said, fact)]
        return plain[0] in plain[1] or plain[1] in plain[0]
    mine, theirs = _count(said), _count(fact)
    # Names are rounded: a model of 7.24 thousand million parameters is called 7B.
    return mine is None or theirs is None or abs(mine - theirs) <= 0.25 * theirs


def _count(text: str) -> float | None:
    match = re.match(r"\s*(\d+(?:\.\d+)?)(?:x(\d+(?:\.\d+)?))?\s*([KMBT])", text, re.IGNORECASE)
    if match is None or match[2]:
        return None
    return float(match[1]) * {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[match[3].lower()]


def _tokens(text: str) -> int:
    match = _CONTEXT.match(text)
    assert match is not None
    return int(match[1]) * _UNITS[match[2].lower()]


def _about(said: int, fact: int) -> bool:
    # 128K is called so whether it is 131072 or 128000.
    return abs(said - fact) <= 0.05 * fact
