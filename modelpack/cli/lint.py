"""`modelpack lint`: does a model fit into a catalogue?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from modelpack.cli.options import Settings, common_options, model_argument, remote_options
from modelpack.cli.output import plural, show, show_json, visible
from modelpack.errors import ModelpackError
from modelpack.operations.remote import RemoteOptions
from modelpack.plugins import load_function


@click.command()
@model_argument("model")
@click.option(
    "--policy", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="FILE",
    help="What the catalogue asks for, in TOML. [default: all rules but that of names]",
)  # fmt: skip
@click.option("-r", "--remote", "from_registry", is_flag=True, help="Of its registry.")
@click.option(
    "--format", "form", type=click.Choice(["text", "json", "sarif"]), default="text",
    show_default=True, help="How to print what is found; --json is the second.",
)  # fmt: skip
@remote_options
@common_options
def lint(
    settings: Settings,
    model: str,
    policy: Path | None,
    from_registry: bool,
    form: str,
    remote: RemoteOptions,
) -> int:
    """Check MODEL, or the directory of that name, by the rules of a catalogue.

    Its name, licence, metadata, chat template and context; pickles, secrets and paths in its files.
    Exit code 0: no errors, 1: errors, 2: it could not be checked.
    """
    from modelpack.linting.policy import LintPolicy, read_policy
    from modelpack.linting.sarif import to_sarif
    from modelpack.operations import lint as linting

    settings.failure_code = 2
    rules = read_policy(policy) if policy is not None else LintPolicy()
    report = linting.lint(
        model,
        rules,
        _render,
        store=None if from_registry or Path(model).is_dir() else settings.store(),
        remote=remote,
        from_registry=from_registry,
    )
    if form == "sarif":
        click.echo(json.dumps(to_sarif(report.name, report.findings), indent=2))
    elif form == "json" or settings.json:
        show_json(
            {
                "name": report.name,
                "passed": report.passed,
                "findings": [finding.to_json() for finding in report.findings],
            }
        )
    else:
        count = plural(len(report.findings), "finding")
        lines = [*(visible(str(finding)) for finding in report.findings), f"{report.name}: {count}"]
        show(settings, {}, "\n".join(lines))
    return 0 if report.passed else 1


def _render(source: str, variables: Mapping[str, Any]) -> str:
    try:
        chat_template = load_function("chat_template")
    except ModuleNotFoundError as error:
        raise ModelpackError(
            f"{error.name} is not installed, which renders chat templates",
            hint="pip install 'modelpack[engine]', or switch the rule `template` off",
        ) from None
    assert chat_template is not None, "registered by this distribution"
    return str(chat_template(source).render(variables))
