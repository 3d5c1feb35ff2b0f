"""The options of speculative decoding, and the model that drafts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from modelpack.cli.options import Settings
from modelpack.cli.progress import shown_progress
from modelpack.operations.remote import RemoteOptions

if TYPE_CHECKING:
    from modelpack.stores.layout import LayoutStore

F = TypeVar("F", bound=Callable[..., Any])

#: What the options are called, which are fields of EngineConfig too.
NAMES = ("speculative_method", "draft_model", "num_speculative_tokens",
         "speculative_min_acceptance", "speculative_disable_by_batch_size")  # fmt: skip


def speculation_options(command: F) -> F:
    """Add the options; no answer changes by any of them."""
    options = (
        click.option(
            "--speculative-method",
            type=click.Choice(["ngram", "draft"]),
            help="Propose tokens and verify many in a step: by lookup in the text so far, or by "
            "--draft-model, which implies draft.",
        ),
        click.option(
            "--draft-model",
            metavar="REF|DIR",
            callback=_draft_model,
            help="A smaller model with the same vocabulary, which proposes tokens.",
        ),
        click.option(
            "--num-speculative-tokens",
            type=click.IntRange(min=1),
            help="Tokens proposed at a time.",
        ),
        click.option(
            "--speculative-min-acceptance",
            type=click.FloatRange(0, 1),
            default=0.0,
            show_default=True,
            help="Propose nothing that the draft model gives a lower probability.",
        ),
        click.option(
            "--speculative-disable-by-batch-size",
            type=click.IntRange(min=0),
            help="Propose nothing while more requests than these generate.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _draft_model(
    _context: click.Context, _parameter: click.Parameter, text: str | None
) -> str | Path | None:
    """Return the path of what is there, else the name of a model."""
    if text is None or not Path(text).exists():
        return text
    return Path(text)


def pull_draft(config: Any, store: LayoutStore, settings: Settings, remote: RemoteOptions) -> None:
    """Pull the draft model of an EngineConfig, if it names one that the store lacks."""
    from modelpack.operations.find import find_model
    from modelpack.operations.watching import watching

    if isinstance(config.draft_model, str) and config.speculation == "draft":
        with shown_progress(settings) as progress:
            name, watch = config.draft_model, watching(progress)
            find_model(name, store, pull=True, remote=remote, watch=watch)
