"""Every block of shell and Python in the documents runs as it stands, or says why it does not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs import shell
from tests.docs.blocks import OTHERS, ROOT, RUNNABLE, Block, pages, parse, read
from tests.docs.world import Models, World

# What a line of shell begins with: blocks of such lines are shell, whatever they say.
_PROGRAMS = ("modelpack ", "docker ", "pip ", "vllm ", "curl ", "export ", "cosign ", "$ ")


def runnable(page: str, *, long: bool) -> list[Block]:
    """The blocks of a page that are run; short ones only, or all of them."""
    return [
        block
        for block in read(page)
        if block.not_run is None
        and (long or not block.long)
        and (block.language in RUNNABLE or block.file)
    ]


LONG = [page for page in pages() if any(block.long for block in read(page))]
SHORT = [
    page
    for page in pages()
    if page not in LONG and any(block.file is None for block in runnable(page, long=False))
]


@pytest.mark.parametrize("page", pages())
def test_blocks_are_run_or_say_why_not(page: str) -> None:
    for block in read(page):
        assert block.language in RUNNABLE + OTHERS, f"{block.place}: what language is this?"
        if block.language in RUNNABLE:
            continue
        shell_like = [line for line in block.code.splitlines() if line.startswith(_PROGRAMS)]
        assert not shell_like, f"{block.place}: this is shell: {shell_like[0]}"


@pytest.mark.parametrize("page", pages())
def test_tests_that_run_blocks_elsewhere_exist(page: str) -> None:
    for block in read(page):
        for path in re.findall(r"\b(?:tests|scripts)/[\w./-]*\w", block.not_run or ""):
            assert (ROOT / path).exists(), f"{block.place}: there is no {path}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models.tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models.real(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=() if page == "README.md" else pytest.mark.long) for page in SHORT],
)
def test_a_page_runs(page: str, tiny: Models, tmp_path: Path) -> None:
    shell.run(runnable(page, long=False), World(tmp_path / "world", tiny))


@pytest.mark.parametrize("page", LONG)
def test_real_models_are_not_asked_for_endless_answers(page: str) -> None:
    """One in ten answers of a small model, drawn at random, goes on until its context is full."""
    for block in runnable(page, long=True):
        for line in block.code.splitlines():
            bounded = "--temperature 0" in line or "--max-tokens" in line
            assert bounded or not line.startswith("modelpack run "), f"{block.place}: {line}"


@pytest.mark.long
@pytest.mark.weights
@pytest.mark.parametrize("page", LONG)
def test_a_page_runs_with_real_weights(page: str, real: Models, tmp_path: Path) -> None:
    shell.run(runnable(page, long=True), World(tmp_path / "world", real))


# The runner itself: what it is not told must not pass.


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("```sh\ntrue\n", "does not end"),
        ("text\n\n    modelpack list\n", "indented"),
        ("<!-- not run -->\n```sh\ntrue\n```\n", "needs a reason"),
        ("<!-- long -->\ntext\n", "no block follows"),
    ],
)
def test_what_the_reader_of_blocks_refuses(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse("page.md", text)


def test_a_block_that_fails_fails_the_page(tiny: Models, tmp_path: Path) -> None:
    blocks = [
        Block("page.md", 1, "sh", "x=1; cd model"),
        Block("page.md", 5, "sh", "[ $x = 1 ] && [ -e config.json ]\nfalse\ntrue"),
    ]
    with pytest.raises(pytest.fail.Exception, match=r"page\.md:5 ends with 1"):
        shell.run(blocks, World(tmp_path / "world", tiny))


def test_a_block_that_should_fail_has_to(tiny: Models, tmp_path: Path) -> None:
    world = World(tmp_path / "world", tiny)
    assert shell.run([Block("page.md", 1, "sh", "exit 3", exit_code=3)], world) == ""
    again = World(tmp_path / "again", tiny)
    with pytest.raises(pytest.fail.Exception, match=r"page\.md:1"):
        shell.run([Block("page.md", 1, "sh", "true", exit_code=3)], again)
