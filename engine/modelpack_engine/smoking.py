"""smoke_test: does a model load, answer, and answer fast enough?"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

from modelpack.errors import ModelpackError, UsageError
from modelpack_engine.chatting import Conversation
from modelpack_engine.config import EngineConfig
from modelpack_engine.opening import Opened


@dataclass(frozen=True, slots=True)
class SmokeReport:
    """What a smoke test saw. Times are in seconds; `problems` is empty if it passed."""

    reference: str | None
    digest: str
    prompt: str
    answer: str = ""
    completion_tokens: int = 0
    load_seconds: float = 0.0
    time_to_first_token: float = 0.0
    tokens_per_second: float = 0.0
    problems: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Return the report for programs."""
        return {
            "passed": self.passed,
            "problems": list(self.problems),
            "reference": self.reference,
            "digest": self.digest,
            "prompt": self.prompt,
            "answer": self.answer,
            "completionTokens": self.completion_tokens,
            "loadSeconds": round(self.load_seconds, 3),
            "timeToFirstTokenSeconds": round(self.time_to_first_token, 3),
            "tokensPerSecond": round(self.tokens_per_second, 2),
        }


def smoke_test(
    opened: Opened,
    config: EngineConfig | None = None,
    *,
    prompt: str = "What is the capital of France?",
    expect: str | None = None,
    min_tokens_per_second: float | None = None,
    max_tokens: int = 64,
) -> SmokeReport:
    """Load the model, ask it once, greedily, and check the answer.

    The answer must not be empty, nor hold characters that no text has, and has to match the
    regular expression `expect`. A failure to load or to answer is reported, not raised.
    """
    try:
        pattern = re.compile(expect) if expect is not None else None
    except re.error as error:
        raise UsageError(f"{expect!r} is not a regular expression: {error}") from None
    reference = str(opened.model.reference) if opened.model.reference else None
    digest = str(opened.model.digest)
    start = time.perf_counter()
    try:
        conversation = Conversation(opened.engine(config), max_tokens=max_tokens, temperature=0)
        loaded = time.perf_counter()
        first = 0.0
        pieces = []
        for piece in conversation.ask(prompt):
            first = first or time.perf_counter()
            pieces.append(piece)
        end = time.perf_counter()
    except ModelpackError as error:
        return SmokeReport(reference, digest, prompt, problems=(str(error),))
    answer, count = "".join(pieces), conversation.last_usage.completion_tokens
    # The first token's time is the prompt's; the rest is the speed of generation.
    speed = (count - 1) / (end - first) if count > 1 and end > first else 0.0
    problems = []
    if not answer.strip():
        problems.append("the answer is empty")
    if "\ufffd" in answer or "\0" in answer:
        problems.append("the answer holds bytes that are no text")
    if pattern is not None and not pattern.search(answer):
        problems.append(f"the answer does not match {expect!r}")
    if min_tokens_per_second is not None and speed < min_tokens_per_second:
        problems.append(f"{speed:.1f} tokens a second, expected {min_tokens_per_second} or more")
    return SmokeReport(
        reference,
        digest,
        prompt,
        answer,
        count,
        loaded - start,
        (first or end) - loaded,
        speed,
        tuple(problems),
    )
