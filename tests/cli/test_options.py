"""The options of all commands: which shared ones act, their names, and errors that show them."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import click
import pytest

from modelpack.cli.main import cli
from modelpack.cli.options import SharedOption
from tests.cli.running import modelpack

pytest.importorskip("modelpack_server")

CONNECTION = ("plain_http", "insecure", "allow_private", "ca_file", "client_cert", "client_key")
IDENTITY = (
    *("authorities", "certificate_identity", "certificate_identity_regexp"),
    *("certificate_oidc_issuer", "certificate_oidc_issuer_regexp", "trusted_root"),
)
SHARED = {
    "store": ("store",), "json": ("as_json",), "quiet": ("quiet",), "progress": ("progress",),
    "registry": CONNECTION,
    "download": ("concurrency", "connections", "limit_rate"),
    "upload": ("concurrency", "chunk_size", "limit_rate"),
    "parallel": ("concurrency",),
    "identity": IDENTITY,
    "trust": ("keys", "formats", *IDENTITY, "policy"),
    "variant": ("variant",),
}  # fmt: skip

# The shared options that act, by command; all have --debug. "store" is left out by commands that
# read and write none, "json" by those that print no result or exact bytes, "quiet" by those without
# notes, "progress" by those that never take long.
ACTS = {
    "adapter add": "json",
    "adapter ls": "json quiet",
    "adapter rm": "json",
    "attach": "store json quiet progress registry upload",
    "bench": "store json quiet progress",
    "bundle": "store json quiet progress registry download trust variant",
    "catalog": "json quiet registry parallel",
    "completion": "",
    "compose install": "json quiet",
    "compose stop": "json quiet",
    "config": "store quiet registry",
    "configure": "json",
    "convert": "store json quiet progress registry download upload trust",
    "copy": "json quiet progress registry download upload",
    "detach": "store json registry",
    "diff": "store json registry",
    "doctor": "store json registry",
    "export": "store json quiet progress registry trust",
    "fsck": "store json quiet progress registry download",
    "gateway": "json quiet",
    "gateway key create": "json quiet",
    "gateway key list": "json quiet",
    "gateway key revoke": "json quiet",
    "gc": "store json quiet",
    "help": "json",
    "import": "store json quiet progress registry download trust",
    "index create": "store json quiet progress registry download upload",
    "index show": "store json quiet registry",
    "inspect": "store json quiet registry variant",
    "k8s": "json registry trust",
    "keygen": "json quiet",
    "launch": "json quiet",
    "lint": "store json registry",
    "list": "store json quiet",
    "lock": "store json quiet registry",
    "login": "json quiet registry",
    "logout": "json",
    "logs": "json",
    "manifest": "store quiet registry variant",
    "package": "store json quiet progress registry download upload trust",
    "prune": "store json quiet",
    "ps": "json quiet",
    "pull": "store json quiet progress registry download trust variant",
    "push": "store json quiet progress registry upload",
    "referrers": "store json quiet registry",
    "registry serve": "store quiet",
    "requests": "json quiet",
    "resolve": "store json quiet progress registry download trust variant",
    "rm": "store json quiet",
    "run": "store json quiet progress registry download trust variant",
    "sbom": "store json quiet registry",
    "search": "store json quiet registry",
    "serve": "store json quiet progress registry download trust variant",
    "service install": "store json quiet",
    "service remove": "json",
    "sign": "store json quiet registry",
    "smoke": "store json quiet progress registry download trust variant",
    "tag": "store json quiet",
    "transcribe": "store json quiet progress registry download trust variant",
    "unload": "json",
    "verify": "store json quiet registry identity",
    "version": "json",
}
# Docker Compose defines the options of these.
OF_COMPOSE = {"compose", "compose up", "compose down", "compose metadata"}


def walk(
    command: click.Command, words: tuple[str, ...] = ()
) -> Iterator[tuple[str, click.Command]]:
    """Yield each command below `command` and its name, without groups that only hold others."""
    if words and (not isinstance(command, click.Group) or command.params):
        yield " ".join(words), command
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            child = command.get_command(click.Context(command), name)
            assert child is not None
            yield from walk(child, (*words, name))


COMMANDS = dict(walk(cli))
OPTIONS = [
    (name, option)
    for name, command in COMMANDS.items()
    for option in command.params
    if isinstance(option, click.Option)
]


def test_the_table_has_all_commands() -> None:
    assert ACTS.keys() == COMMANDS.keys() - OF_COMPOSE


@pytest.mark.parametrize("name", ACTS)
def test_a_command_has_the_shared_options_that_act(name: str) -> None:
    found = {option.name for option in COMMANDS[name].params if isinstance(option, SharedOption)}
    assert found == {"debug", *(option for word in ACTS[name].split() for option in SHARED[word])}


@pytest.mark.parametrize("name", ACTS)
def test_a_command_uses_all_that_it_takes(name: str) -> None:
    """Every parameter of the function is read in its body."""
    callback: Any = COMMANDS[name].callback
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(callback))))
    [function] = tree.body
    assert isinstance(function, ast.FunctionDef)
    taken = {a.arg for a in (*function.args.args, *function.args.kwonlyargs)} - {"settings"}
    read = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    assert taken <= read


# One name for one thing, on all commands.
@pytest.mark.parametrize(
    ("option", "meaning"),
    [("--host", "Listen on this address."), ("--url", "server"), ("--store", "local store"),
     ("--max-model-len", "Limit the context"), ("--keys", "API key"), ("--json", "as JSON")],
)  # fmt: skip
def test_a_name_means_one_thing(option: str, meaning: str) -> None:
    found = [one for _, one in OPTIONS if one.opts[0] == option]
    assert found
    for one in found:
        assert meaning in (one.help or "")


def test_the_context_has_one_name() -> None:
    found = {name: one.opts for name, one in OPTIONS if "--context-size" in one.opts}
    assert found.pop("package") == ["--context-size"]  # the name in Docker's format, and in its CLI
    assert found.pop("compose up") == ["--context-size"]
    for names in found.values():
        assert names == ["--max-model-len", "--context-size"]


#: Options whose text the library checks.
CHECKED = ("--cors", "--created", "--preset")


def bad_values() -> Iterator[tuple[str, click.Option, str]]:
    """Yield each option that checks its value, with a value that is wrong."""
    for name, option in OPTIONS:
        if option.is_flag or not option.opts[0].startswith("-"):
            continue
        kind = option.type
        if isinstance(kind, click.Path) and kind.exists:
            yield name, option, "/nonexistent/file"
        elif isinstance(kind, click.Path) and not kind.dir_okay:
            continue
        elif (kind is not click.STRING and not isinstance(kind, click.Path)) or option.opts[
            0
        ] in CHECKED:
            yield name, option, "bad value"


BAD = list(bad_values())


@pytest.mark.parametrize(
    ("name", "option", "value"), BAD, ids=[f"{name} {option.opts[0]}" for name, option, _ in BAD]
)
def test_an_error_shows_the_option_as_typed(name: str, option: click.Option, value: str) -> None:
    typed = option.opts[-1]
    failed = modelpack(*name.split(), typed, value)
    assert failed.code == 2
    assert failed.out == ""
    assert typed in failed.err
    python = {one.name for one in COMMANDS[name].params if one.name and "_" in one.name}
    words = failed.err.replace("Usage:", "").split()
    assert not python & {word.strip("',.:;()") for word in words}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--speculative-method", "draft"], "--speculative-method draft requires --draft-model"),
        (
            ["--speculative-method", "mtp", "--draft-model", "x"],
            "--speculative-method mtp does not use --draft-model",
        ),
        (
            ["--speculative-method", "ngram", "--draft-model", "x"],
            "--speculative-method ngram does not use --draft-model",
        ),
        (["--kv-offload-disk", "1GiB"], "--kv-offload-disk requires --kv-offload-dir"),
    ],
)
def test_an_option_that_needs_another_says_so(options: list[str], problem: str) -> None:
    failed = modelpack("serve", *options)
    assert (failed.code, failed.out) == (2, "")
    assert problem in failed.err


@pytest.mark.parametrize("path", ["./nothing", "/nothing/at/all", "~/nothing", "../nothing.gguf"])
def test_a_draft_model_that_does_not_exist(path: str) -> None:
    failed = modelpack("serve", "--draft-model", path)
    assert failed.code != 0
    assert f"no such file or directory: {path}" in failed.err
