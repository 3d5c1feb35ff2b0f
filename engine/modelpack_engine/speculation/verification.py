"""How many of the proposed tokens a sequence really goes on with. Plain integers.

The sampler draws a token from the logits, the request's seed and the token's position, so what it
draws in a proposal's rows is what it would have drawn step by step, as far as the tokens before are
those that were proposed. A proposed token counts if it is the one that was drawn: no output differs
from that without speculation, which is more than keeping its distribution.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """`num_tokens` of the drawn tokens count, the last of which was not proposed; or none do.

    What the rows from `broken` on hold (None: of none) is not to stay: their logits were no
    numbers, so their keys and values may not be, either.
    """

    num_tokens: int
    broken: int | None = None


def verify(proposed: Tokens[int], drawn: Tokens[int], *, no_token: int) -> Verdict:
    """Return what counts of the tokens `drawn` in the rows of a proposal, one more than it has.

    A row in which no token could be drawn is left to the next step, where it comes first. In the
    first row that may be the doing of a proposed token: masked values still meet a product with
    zero, and zero times NaN is NaN.
    """
    assert len(drawn) == len(proposed) + 1, "a row for the newest token and for each proposed one"
    if drawn[0] == no_token:
        return Verdict(0, 0)
    count = 1
    for guess, token_id in zip(proposed, drawn, strict=False):
        if guess != token_id or drawn[count] == no_token:
            break
        count += 1
    broken = next((row for row in range(1, len(drawn)) if drawn[row] == no_token), None)
    return Verdict(count, broken)
