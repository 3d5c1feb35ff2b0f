"""Lint: does a model, or a directory that is to become one, fit into a catalogue?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from modelpack.linting.checking import check
from modelpack.linting.description import Render
from modelpack.linting.findings import Finding, Level
from modelpack.linting.policy import LintPolicy
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.subjects import directory_subject, open_subject
from modelpack.progress import Stop
from modelpack.stores.layout import LayoutStore


@dataclass(frozen=True, slots=True)
class LintReport:
    """What was found in the model `name`; it passes without a finding of level error."""

    name: str
    findings: tuple[Finding, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing is an error."""
        return all(finding.level is not Level.ERROR for finding in self.findings)


def lint(
    name: str,
    policy: LintPolicy,
    render: Render,
    *,
    store: LayoutStore | None = None,
    remote: RemoteOptions | None = None,
    from_registry: bool = False,
    stop: Stop | None = None,
) -> LintReport:
    """Check the stored model `name`, that of its registry, or the files in a directory `name`.

    `render` renders chat templates. Of weights only headers are read. Raises `NotFoundError`, and
    `PackagingError` for a directory that cannot be read.
    """
    if not from_registry and Path(name).is_dir():
        subject = directory_subject(Path(name))
        return LintReport(subject.name, check(subject, policy, render))
    with open_subject(name, store=store, remote=remote, from_registry=from_registry, stop=stop) as (
        _,
        subject,
    ):
        return LintReport(subject.name, check(subject, policy, render))
