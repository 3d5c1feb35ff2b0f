"""What the documents call an option, a command or a variable is one, and none is left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from modelpack.cli.main import ALIASES
from scripts.documents.commands import commands
from tests.docs.blocks import ROOT, pages

COMMANDS = list(commands())
NAMES = {command.name for command in COMMANDS} | {f"modelpack {alias}" for alias in ALIASES}
OPTIONS = {
    option
    for command in COMMANDS
    for names, _ in command.options + command.registry_options + command.common_options
    for option in re.findall(r"--[\w-]+", names)
}
# Options of other programs, and flags of models, which are llama.cpp's and vLLM's.
OTHERS = {
    "cn": "--config",
    "cosign, model_signing": "--certificate_chain --new-bundle-format --public_key "
    "--signature --signature-digest-algorithm --type",
    "docker": "--abort-on-container-exit --build --build-arg --hf_overrides --rm "
    "--speculative-draft-model --speculative-min-acceptance-rate --speculative-num-tokens",
    "kit, modctl": "--filter --no-creation-time --patterns",
    "helm": "--set",
    "kubectl": "--from-file",
    "mlx.launch, ray": "--address --head --hostfile",
    "Prometheus Adapter": "--metrics-relist-interval",
    "pip": "--find-links --no-deps --no-index",
    "runtime flags": "--block-size --ctx-size --draft-max --draft-p-min --frequency-penalty "
    "--ignore-eos --min-p --model-draft --n-predict --no-enable-prefix-caching --presence-penalty "
    "--repeat-penalty --temp --threads --top-k --top-p --verbose",
    "scripts.packages": "--homepage",
    "systemctl": "--user",
    "vllm": "--distributed-executor-backend --dtype --headless --master-addr --nnodes --node-rank "
    "--override-generation-config --pipeline-parallel-size",
}
KNOWN = OPTIONS | {option for line in OTHERS.values() for option in line.split()}
# Docker Compose runs these, and MODELPACK_LIFELINE is between a server's own processes.
NOT_FOR_USERS = {"modelpack compose up", "modelpack compose down", "modelpack compose metadata"}
NOT_SET_BY_USERS = {"MODELPACK_LIFELINE"}


@pytest.mark.parametrize("page", pages())
def test_options_and_commands_exist(page: str) -> None:
    text = re.sub(r"<!--.*?-->", "", (ROOT / page).read_text(), flags=re.DOTALL)
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) <= KNOWN
    named = re.findall(r"(?:`|^)(modelpack [a-z0-9]+)\b", text, re.MULTILINE)
    assert set(named) <= NAMES


def test_options_of_others_are_still_named() -> None:
    text = "".join((ROOT / page).read_text() for page in pages())
    assert {option for option in KNOWN - OPTIONS if option not in text} == set()


def test_the_table_has_every_command() -> None:
    table = (ROOT / "docs" / "cli.md").read_text()
    for name in {command.name for command in COMMANDS} - NOT_FOR_USERS - {"modelpack"}:
        assert re.search(rf"`{name.removeprefix('modelpack ')}\b", table), name


def test_the_table_has_every_variable() -> None:
    files = [path for part in ("modelpack", "engine") for path in Path(ROOT, part).rglob("*.py")]
    read = {
        name for path in files for name in re.findall(r"\bMODELPACK_[A-Z_]+\b", path.read_text())
    }
    table = (ROOT / "docs" / "cli.md").read_text().partition("## Environment")[2]
    assert {name for name in read - NOT_SET_BY_USERS if f"`{name}`" not in table} == set()


def usages() -> list[str]:
    """Return the code spans in the first column of the table of commands."""
    lines = (ROOT / "docs" / "cli.md").read_text().partition("| Command |")[2].splitlines()
    table = lines[2 : lines.index("", 2)]
    return [span for line in table for span in re.findall(r"`([^`]+)`", line.partition(" | ")[0])]


@pytest.mark.parametrize("usage", usages())
def test_the_table_shows_options_of_the_command(usage: str) -> None:
    words = re.sub(r"\\\|", "|", usage).replace("…", " ").translate(dict.fromkeys(map(ord, "[]")))
    command = max(
        (one for one in COMMANDS if f"modelpack {words} ".startswith(f"{one.name} ")),
        key=lambda one: len(one.name),
    )
    rows = command.options + command.registry_options + command.common_options
    for name, value in re.findall(r"(?<![\w-])(--?[a-z][\w-]*)(?: ([^\s-]\S*))?", words):
        [row] = [row for row, _ in rows if re.search(rf"(^|[ ,/]){name}\b(?!-)", row)]
        choices = re.search(r" \[?([\w.-]+(?:\|[\w.-]+)+)\]?$", row)
        if choices and "|" in value:
            assert set(value.split("|")) == set(choices[1].split("|")), f"{usage}: {name}"


def test_the_table_is_read() -> None:
    assert len(usages()) > 45
    assert any("--links" in usage for usage in usages())
