"""`modelpack smoke --attest`: its report as an in-toto attestation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelpack.cli.options import Settings
from modelpack.cli.output import note
from modelpack.cli.signing import private_key
from modelpack.errors import UsageError
from modelpack.operations.remote import RemoteOptions
from modelpack.reference import is_model_id

if TYPE_CHECKING:
    from modelpack.model import Model
    from modelpack_server.smoke_test import SmokeReport

#: Attaches the report about a model.
Attestation = Callable[["SmokeReport", "Model", RemoteOptions, Settings], None]


def attestation_of(
    name: str, attest: bool, key: Path | None, local: bool, clean: bool
) -> Attestation | None:
    """Return what attaches a report; raise `UsageError` for options that do not fit."""
    if not attest:
        if key is not None or local:
            raise UsageError("--key and --local are for --attest")
        return None
    if key is None:
        raise UsageError("--attest signs: it needs --key")
    if local and clean:
        raise UsageError("--clean has a store that goes: --local has no place")
    if is_model_id(name.strip()) and not local:
        raise UsageError(f"{name} is an id, and names no registry", hint="use --local")
    signer = private_key(key)

    def attach(
        report: SmokeReport, tested: Model, remote: RemoteOptions, settings: Settings
    ) -> None:
        from modelpack.operations.attesting import attest as attach_signed
        from modelpack.supply.statements import TEST_RESULT

        digest = attach_signed(
            tested,
            TEST_RESULT,
            test_result(report),
            signer,
            store=settings.store() if local else None,
            remote=remote,
        )
        note(settings, f"attached the report to {tested.digest}: {digest}")

    return attach


def test_result(report: SmokeReport) -> dict[str, Any]:
    """Return the predicate: what in-toto's test results have, and the report as a whole."""
    passed = [check.name for check in report.checks if check.problem is None]
    failed = [check.name for check in report.checks if check.problem is not None]
    (failed if report.error is not None else passed).insert(0, "loads and answers")
    return {
        "result": "PASSED" if report.passed else "FAILED",
        "configuration": [{"name": "modelpack smoke", "uri": "urn:modelpack:smoke"}],
        "passedTests": passed,
        "failedTests": failed,
        "report": report.to_json(),
    }
