"""`modelpack doctor`: what this machine can run, and by what."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from modelpack.cli.options import Settings, common_options, model_names, remote_options
from modelpack.cli.output import show, table
from modelpack.errors import ModelpackError, UsageError
from modelpack.operations.remote import RemoteOptions
from modelpack_server.cli.engine_options import require_engine

if TYPE_CHECKING:
    from modelpack.operations.checkup import Check

#: The ports that our servers take where none is named.
_PORTS = ((12434, "serve"), (12435, "gateway"), (5000, "registry serve"))


@click.command()
@click.argument("models", metavar="[MODEL]...", nargs=-1, shell_complete=model_names)
@click.option(
    "--registry", "registries", metavar="HOST", multiple=True,
    help="A registry to ask. May be repeated. [default: the one of names without any]",
)  # fmt: skip
@click.option("--offline", is_flag=True, help="Ask no registry.")
@remote_options
@common_options
def doctor(
    settings: Settings,
    models: tuple[str, ...],
    registries: tuple[str, ...],
    offline: bool,
    remote: RemoteOptions,
) -> int:
    """Check device, memory, store, registry, backends and ports; say by what MODELs would be run.

    Exit code 1 if something has failed; what only some commands need is a warning.
    """
    import os

    from modelpack._version import __version__
    from modelpack.operations.checkup import Verdict, check_port, check_registry, check_store, worst
    from modelpack.reference import DEFAULT_REGISTRY

    checks = _engine_checks(settings, models)
    checks.append(check_store(settings.store_root))
    if not offline:
        hosts = registries or (os.environ.get("DEFAULT_REGISTRY") or DEFAULT_REGISTRY,)
        checks += [check_registry(host, remote) for host in hosts]
    checks += [check_port(port, purpose) for port, purpose in _PORTS]
    verdict = worst(checks)
    value = {
        "modelpack": __version__,
        "verdict": str(verdict),
        "checks": [
            {key: item for key, item in asdict(check).items() if item is not None}
            for check in checks
        ],
    }
    show(settings, value, _shown(checks))
    return 1 if verdict is Verdict.FAILED else 0


def _engine_checks(settings: Settings, models: tuple[str, ...]) -> list[Check]:
    from modelpack.operations.checkup import Check, Verdict
    from modelpack.operations.find import inspect

    try:
        require_engine()
    except UsageError as error:
        # Packing and moving models needs none of it.
        verdict = Verdict.FAILED if models else Verdict.WARNING
        return [Check("engine", verdict, str(error), hint=error.hint)]
    from modelpack_server import doctor as checkup

    device, where = checkup.check_device()
    memory = checkup.check_memory()
    checks = [device, memory, *checkup.check_backends(), *checkup.check_choices(where)]
    available = (memory.details or {}).get("available", 0)
    for name in models:
        try:
            model = inspect(name, store=settings.store())
        except ModelpackError as error:
            checks.append(checkup.failed(f"model {name}", error))
        else:
            checks.append(checkup.check_model(model, where, available))
    return checks


def _shown(checks: list[Check]) -> str:
    rows = []
    for check in checks:
        rows.append((str(check.verdict), check.name, check.message))
        if check.hint:
            rows.append(("", "", f"hint: {check.hint}"))
    return table(("", "CHECK", "RESULT"), rows)
