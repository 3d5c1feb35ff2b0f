"""Sizes as arguments of options."""

from __future__ import annotations

import click
import pytest

from modelpack.cli.options import SIZE
from tests.cli.running import modelpack


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("10MB", 10**7), ("64MiB", 64 * 2**20), ("1.5k", 1500), ("2g", 2 * 10**9)],
)
def test_sizes(text: str, size: int) -> None:
    assert SIZE.convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "ten", "-1", "0", "5 parsecs", "0.1"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter):
        SIZE.convert(text, None, None)


@pytest.mark.parametrize("option", ["--chunk-size", "--limit-rate", "--connections"])
def test_options_that_make_no_sense_are_wrong_usage(option: str) -> None:
    done = modelpack("pull", "127.0.0.1:9/a/b:c", option, "0")
    assert done.code == 2
    assert option in done.err
