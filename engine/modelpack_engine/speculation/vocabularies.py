"""Whether a draft model writes the same tokens as the model that it drafts for."""

from __future__ import annotations

from modelpack_engine.errors import EngineError
from modelpack_engine.loaders.tokenizer import Tokenizer


def check_same_vocabulary(target: Tokenizer, draft: Tokenizer) -> None:
    """Raise `EngineError`, naming the first difference, unless ids mean the same to both.

    One vocabulary may go on after the other's end: models of one family differ so in size.
    """
    shared = min(target.num_ids, draft.num_ids)
    for token_id in range(shared):
        wanted, found = target.token_bytes(token_id), draft.token_bytes(token_id)
        if wanted != found:
            raise EngineError(
                f"the draft model has another vocabulary: token {token_id} is {found!r}, and "
                f"{wanted!r} in the model that it drafts for",
                hint="choose a smaller model of the same family, or --speculative-method ngram",
            )
    if shared < max(target.num_ids, draft.num_ids) // 2:
        raise EngineError(
            f"the draft model has {draft.num_ids} tokens, and the model that it drafts for "
            f"{target.num_ids}",
            hint="choose a smaller model of the same family, or --speculative-method ngram",
        )
