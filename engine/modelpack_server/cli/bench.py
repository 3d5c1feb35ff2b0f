"""`modelpack bench`: measure latency and throughput of models and OpenAI-compatible servers."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modelpack.cli.help import Command, command
from modelpack.cli.options import Settings, common_options, model_names
from modelpack.cli.output import note, shown_progress
from modelpack.errors import UsageError
from modelpack_server.bench.workloads import CONCURRENCY, OUTPUT_TOKENS, PROMPT_TOKENS, SECONDS
from modelpack_server.cli.engine_options import require_engine

if TYPE_CHECKING:
    from modelpack_server.bench.benchmark import Measured, Plan
    from modelpack_server.bench.server import OpenAIServer

_FILE = click.Path(dir_okay=False, path_type=Path)
_SCHEMES = ("http://", "https://")
_TYPED = "modelpack_server.cli.bench.typed"


class _Numbers(click.ParamType[Any]):
    """Numbers above 0, separated by commas."""

    name = "numbers"

    def __init__(self, kind: type[int] | type[float]) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the numbers as a tuple."""
        if not isinstance(value, str):
            return value
        try:
            numbers = tuple(self._kind(part) for part in value.split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(0 < number < 10_000 for number in numbers):
            self.fail(f"{value!r} is not a list of numbers like 1,2,4 (each above 0)", param, ctx)
        return numbers


class _Command(Command):
    """A command that keeps its command line for the report."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep `args` and parse them."""
        ctx.meta[_TYPED] = shlex.join(["modelpack", "bench", *args])
        return super().parse_args(ctx, args)


@command(
    cls=_Command,
    epilog="By default, a run takes about a minute per TARGET. The table includes the machine, the "
    "versions and the load, so that others can compare it.",
)
@click.argument("targets", metavar="TARGET...", nargs=-1, required=True, shell_complete=model_names)
@click.option(
    "--concurrency", metavar="N,N…", type=_Numbers(int),
    help="Run this many concurrent clients (closed loop), one number after the other. "
    f"[default: {','.join(map(str, CONCURRENCY))}]",
)  # fmt: skip
@click.option(
    "--rate", metavar="R,R…", type=_Numbers(float),
    help="Send this many requests per second, as a Poisson process, instead of --concurrency.",
)  # fmt: skip
@click.option(
    "--workload", metavar="NAME", multiple=True,
    help="Run this named workload, like load-m-32 or multi-turn, instead. May be repeated.",
)  # fmt: skip
@click.option(
    "--prompt-tokens", type=click.IntRange(1, 131072),
    help=f"Send prompts of about this many tokens. [default: {PROMPT_TOKENS}]",
)  # fmt: skip
@click.option(
    "--output-tokens", type=click.IntRange(1, 32768),
    help=f"Request this many tokens in each response. [default: {OUTPUT_TOKENS}]",
)  # fmt: skip
@click.option("--requests", type=click.IntRange(min=1),
              help="Send this many requests in each load, however long it takes.")  # fmt: skip
@click.option(
    "--seconds", type=click.FloatRange(min=0, min_open=True), default=SECONDS, show_default=True,
    help="Limit the time of all loads of one TARGET, without --requests.",
)  # fmt: skip
@click.option("--model", metavar="NAME", help="Use this model on servers with several.")
@click.option(
    "--api-key-env", metavar="VARIABLE", default="MODELPACK_API_KEY", show_default=True,
    help="Read the servers' API key from this environment variable.",
)  # fmt: skip
@click.option(
    "--serve", metavar="OPTIONS", multiple=True,
    help="Pass OPTIONS to `modelpack serve` for a MODEL. Repeat it to give each TARGET its own.",
)  # fmt: skip
@click.option("--json-file", type=_FILE, metavar="FILE", help="Write all figures to FILE as JSON.")
@click.option("--markdown", type=_FILE, metavar="FILE", help="Write the table to FILE.")
@click.option("--png", type=_FILE, metavar="FILE", help="Draw throughput, TTFT and TPOT to FILE.")
@common_options
def bench(
    settings: Settings,
    targets: tuple[str, ...],
    model: str | None,
    api_key_env: str,
    serve: tuple[str, ...],
    json_file: Path | None,
    markdown: Path | None,
    png: Path | None,
    **load: Any,
) -> int:
    """Measure latency and throughput of each TARGET; compare it with the first.

    A TARGET is a MODEL, which is served for the measurement, or the URL of any server with the
    OpenAI API.
    """
    if importlib.util.find_spec("httpx") is None:
        raise UsageError("bench requires httpx, which is not installed",
                         hint="run pip install 'modelpack[bench]'")  # fmt: skip
    from modelpack_server.bench import benchmark as machine
    from modelpack_server.bench import tables
    from modelpack_server.bench.benchmark import Benchmark
    from modelpack_server.bench.server import OpenAIServer
    from modelpack_server.bench.tables import draw, require_matplotlib

    plan = _plan(**load)
    options = _options(targets, serve)
    if png is not None:
        require_matplotlib()
    for path in (json_file, markdown, png):
        if path is not None and not path.parent.is_dir():  # fail before a minute of measuring
            raise UsageError(f"cannot write {path}: no such directory: {path.parent}")
    api_key = os.environ.get(api_key_env) or None
    measured = []
    for target, name, given in zip(targets, _names(targets, serve), options, strict=True):
        is_url = target.startswith(_SCHEMES)
        with _address(settings, target, given) as url:
            server = OpenAIServer(
                url, model=model if is_url else target, api_key=api_key if is_url else None
            )
            versions = {} if is_url else machine.our_versions()
            measured.append(asyncio.run(_measure(settings, server, name, plan, versions)))
    typed = click.get_current_context().meta[_TYPED]
    found = Benchmark(plan, machine.this_machine(), tuple(measured), typed)
    text, as_json = tables.markdown(found), json.dumps(found.to_json(), indent=2) + "\n"
    click.echo(as_json if settings.json else text, nl=False)
    _write(json_file, lambda path: path.write_text(as_json, encoding="utf-8"))
    _write(markdown, lambda path: path.write_text(text, encoding="utf-8"))
    _write(png, lambda path: draw(found, path))
    return 0 if found.succeeded else 1


async def _measure(
    settings: Settings, server: OpenAIServer, name: str, plan: Plan, versions: dict[str, str]
) -> Measured:
    from modelpack_server.bench.benchmark import measure

    async with server:
        return await measure(
            server, name, plan, versions=versions, progress=lambda text: note(settings, text)
        )


@contextmanager
def _address(settings: Settings, target: str, options: Sequence[str]) -> Iterator[str]:
    """Yield the address of a server, starting one for a model."""
    if target.startswith(_SCHEMES):
        yield target
        return
    require_engine()
    from modelpack.operations.pull import find_model
    from modelpack.operations.remote import RemoteOptions
    from modelpack.storage import watching
    from modelpack.trust.policy import Trust
    from modelpack_server.bench.server import served

    store = settings.store()
    with shown_progress(settings) as progress:
        remote = RemoteOptions(trust=Trust.from_environment())  # the server applies the same policy
        find_model(target, store, pull=True, remote=remote, watch=watching(progress))
    note(settings, f"starting a server for {target}")
    with served(target, ["--store", str(store.root), *options]) as url:
        yield url


def _plan(
    *,
    concurrency: tuple[int, ...] | None,
    rate: tuple[float, ...] | None,
    workload: tuple[str, ...],
    prompt_tokens: int | None,
    output_tokens: int | None,
    requests: int | None,
    seconds: float,
) -> Plan:
    from modelpack_server.bench import benchmark as plan

    if sum(map(bool, (concurrency, rate, workload))) > 1:
        raise UsageError("--concurrency, --rate and --workload cannot be combined")
    if workload:
        if prompt_tokens or output_tokens:
            raise UsageError(
                "--workload cannot be combined with --prompt-tokens or --output-tokens"
            )
        return plan.named(workload, requests=requests)
    sizes = {"prompt": prompt_tokens or PROMPT_TOKENS, "answer": output_tokens or OUTPUT_TOKENS,
             "requests": requests, "seconds": seconds}  # fmt: skip
    if rate:
        return plan.rates(rate, **sizes)  # type: ignore[arg-type]
    return plan.sweep(concurrency or CONCURRENCY, **sizes)  # type: ignore[arg-type]


def _options(targets: Sequence[str], serve: Sequence[str]) -> list[list[str]]:
    """Return the options of each target's server."""
    if len(serve) > 1 and len(serve) != len(targets):
        raise UsageError(f"expected 1 or {len(targets)} --serve options, got {len(serve)}")
    if serve and all(target.startswith(_SCHEMES) for target in targets):
        raise UsageError("--serve needs a model; only URLs were given")
    try:
        found = [shlex.split(options) for options in serve]
    except ValueError as error:
        raise UsageError(f"--serve: {error}") from None
    return found if len(found) > 1 else (found or [[]]) * len(targets)


def _names(targets: Sequence[str], serve: Sequence[str]) -> list[str]:
    """Return the name of each target in the report, with its options if they differ."""
    if len(serve) > 1:
        targets = [
            f"{target} {options}".strip() for target, options in zip(targets, serve, strict=True)
        ]
    seen: dict[str, int] = {}
    names = []
    for target in targets:
        seen[target] = seen.get(target, 0) + 1
        names.append(target if seen[target] == 1 else f"{target} ({seen[target]})")
    return names


def _write(path: Path | None, write: Callable[[Path], object]) -> None:
    if path is None:
        return
    try:
        write(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
