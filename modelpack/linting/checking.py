"""All rules over one model."""

from __future__ import annotations

from dataclasses import replace

from modelpack.linting.content import check_paths, check_pickles, check_secrets
from modelpack.linting.description import (
    Render,
    check_context,
    check_licence,
    check_metadata,
    check_name,
    template_check,
)
from modelpack.linting.findings import Finding, Level
from modelpack.linting.policy import LintPolicy
from modelpack.linting.subject import LintSubject


def check(subject: LintSubject, policy: LintPolicy, render: Render) -> tuple[Finding, ...]:
    """Return what the rules of the policy find; nothing if all is well."""
    checks = {
        "name": check_name,
        "licence": check_licence,
        "metadata": check_metadata,
        "template": template_check(render),
        "pickle": check_pickles,
        "secrets": check_secrets,
        "paths": check_paths,
        "context": check_context,
    }
    found: list[Finding] = []
    for rule, look in checks.items():
        level = policy.level(rule)
        if level is not Level.OFF:
            found += [replace(one, level=level) for one in look(subject, policy)]
    return tuple(found)
