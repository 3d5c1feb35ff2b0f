"""Findings as SARIF 2.1.0, which code forges show beside the code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import quote

from modelpack._version import __version__
from modelpack.linting.findings import RULES, Finding

SCHEMA: Final = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)


def to_sarif(name: str, findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the log of one run over the model `name`."""
    order = list(RULES)
    rules = [{"id": rule, "shortDescription": {"text": text}} for rule, text in RULES.items()]
    driver = {
        "name": "modelpack lint",
        "version": __version__,
        "rules": rules,
    }
    results = [_result(one, name, order.index(one.rule)) for one in findings]
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }


def _result(finding: Finding, name: str, index: int) -> dict[str, Any]:
    location: dict[str, Any] = {
        "logicalLocations": [{"fullyQualifiedName": name, "kind": "module"}]
    }
    if finding.path is not None:
        physical: dict[str, Any] = {"artifactLocation": {"uri": quote(finding.path)}}
        if finding.line is not None:
            physical["region"] = {"startLine": finding.line}
        location["physicalLocation"] = physical
    return {
        "ruleId": finding.rule,
        "ruleIndex": index,
        "level": str(finding.level),
        "message": {"text": finding.message},
        "locations": [location],
    }
