"""Masks of the rows of a step, proposals included: the tokens allowed after each proposed token."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Tokens
from typing import Protocol, Self, runtime_checkable

from modelpack_engine.core.scheduler import SchedulerOutput
from modelpack_engine.core.sequence import Sequence
from modelpack_engine.errors import EngineError
from modelpack_engine.request import LogitsMask
from modelpack_engine.runner.step import sample_rows
from modelpack_engine.sampling.sampler import SampleRow

_NOTHING = b""

#: Returns the mask of a sequence, None if it has none.
MaskOf = Callable[[Sequence], LogitsMask | None]


@runtime_checkable
class CopyableMask(LogitsMask, Protocol):
    """A mask that can be asked what it would allow: a copy accepts tokens, and it does not."""

    def copy(self) -> Self:
        """Return a mask at the same place, which goes on by itself."""
        ...


def can_look_ahead(mask: LogitsMask | None) -> bool:
    """Return whether a sequence with this mask can have proposals."""
    return mask is None or isinstance(mask, CopyableMask)


def allowed_along(mask: LogitsMask, proposed: Tokens[int]) -> list[bytes | None]:
    """Return what a mask allows now, and after each of the tokens proposed.

    Nothing is allowed where the mask fails after a proposed token: no token is drawn then, and the
    next step, for which that token is not proposed any more, meets the failure. Raises
    `EngineError` if it fails now.
    """
    found = [mask.allowed()]
    if not proposed:
        return found
    assert isinstance(mask, CopyableMask), "others get no proposals"
    copy = mask.copy()
    for token_id in proposed:
        if not _allows(found[-1], token_id):
            break  # it cannot be drawn, so the rows after it mean nothing
        try:
            copy.accept(token_id)
            found.append(copy.allowed())
        except EngineError:
            found.append(_NOTHING)
            break
    return found + [None] * (len(proposed) + 1 - len(found))


def _allows(allowed: bytes | None, token_id: int) -> bool:
    if allowed is None:
        return True
    byte = token_id // 8
    return byte < len(allowed) and bool(allowed[byte] >> token_id % 8 & 1)


def masked_rows(
    output: SchedulerOutput,
    mask_of: MaskOf,
) -> tuple[list[SampleRow], list[tuple[Sequence, EngineError]]]:
    """Return the rows that sample a step's tokens, with what masks allow, and whose masks failed.

    All tokens before the step have been taken.
    """
    failures = []
    rows = sample_rows(output)
    proposed = {proposal.sequence: proposal.token_ids for proposal in output.proposals}
    first = 0
    for sequence in output.sampled:
        token_ids = proposed.get(sequence, ())
        mask = mask_of(sequence)
        if mask is not None:
            try:
                for row, allowed in enumerate(allowed_along(mask, token_ids), first):
                    rows[row] = rows[row]._replace(allowed=allowed)
            except EngineError as error:
                failures.append((sequence, error))
        first += 1 + len(token_ids)
    return rows, failures
