"""`modelpack smoke --attest`: the signed report, attached to the tested model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts.digest import ALGORITHMS, Digest
from modelpack.artifacts.manifest import Manifest
from modelpack.artifacts.reference import Reference
from modelpack.cli.main import run
from modelpack.errors import UntrustedError
from modelpack.operations import signatures as signing
from modelpack.operations.remote import RemoteOptions, open_repository
from modelpack.storage import ReferrerSource, read_blob, watching
from modelpack.testing import registry
from modelpack.trust.keys import PrivateKey
from modelpack.trust.sigstore import (
    BUNDLE,
    PREDICATE_TYPE,
    TEST_RESULT,
    Bundle,
    Statement,
    Subject,
)
from modelpack_server.cli.smoke import test_result as result_of
from modelpack_server.smoke_test import Check, SmokeReport
from tests.engine.embedding.models import write_model
from tests.models import package
from tests.supply.conftest import PASSWORD

SMALL = ("--device", "cpu", "--kv-cache-bytes", "50000000")


def attached(source: ReferrerSource, name: str) -> Bundle:
    subject = source.resolve(name)
    [referrer] = source.referrers(subject.digest, BUNDLE)
    assert referrer.annotations[PREDICATE_TYPE] == TEST_RESULT
    manifest = Manifest.parse(source.fetch_manifest(referrer))
    bundle = Bundle.parse(read_blob(source, manifest.layers[0]), "bundle")
    assert bundle.statement.is_about(subject.digest)
    return bundle


@pytest.mark.long
def test_a_report_is_attached(
    tmp_path: Path,
    keys: Path,
    ours: PrivateKey,
    theirs: PrivateKey,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COSIGN_PASSWORD", PASSWORD.decode())
    store, files = modelpack.Store(tmp_path / "store"), tmp_path / "files"
    files.mkdir()
    write_model(files, "bert")
    with registry(tmp_path / "registry") as server:
        name = f"{server.host}/team/bert:v1"
        package(name, files, store, push=True)
        arguments = ["smoke", name, "--store", str(store.root), *SMALL, "--attest"]
        assert run([*arguments, "--key", str(keys / "ours.key")]) == 0
        report = json.loads(capsys.readouterr().out)
        where = Reference.parse(name)
        with open_repository(where, RemoteOptions(), watching(None)) as repository:
            bundle = attached(repository, "v1")
        with pytest.raises(UntrustedError):  # a passed test is not an approval
            signing.verify(name, [ours.public])
        assert run([*arguments, "--key", str(keys / "ours.key"), "--local"]) == 0
    predicate = bundle.statement.predicate
    del report["schemaVersion"]
    assert predicate["report"] == report
    assert predicate["result"] == "PASSED"
    assert predicate["passedTests"] == ["loads and answers", "finite", "not zero"]
    assert bundle.envelope.is_signed_by(ours.public)
    assert not bundle.envelope.is_signed_by(theirs.public)
    assert attached(store, name).statement.predicate["result"] == "PASSED"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_statements_about_digests_of_every_algorithm(algorithm: str) -> None:
    subject = Digest.of(b"", algorithm)
    raw = Statement((Subject(subject),), TEST_RESULT).encode()
    assert Statement.parse(raw, "it").is_about(subject)


def test_what_failed_is_said() -> None:
    checks = (Check("printable", "it is not"), Check("ended"))
    value = result_of(SmokeReport(None, "sha256:0", "?", checks=checks))
    assert (value["result"], value["failedTests"]) == ("FAILED", ["printable"])
    assert value["passedTests"] == ["loads and answers", "ended"]
    value = result_of(SmokeReport(None, "sha256:0", "?", error="no room"))
    assert (value["failedTests"], value["passedTests"]) == (["loads and answers"], [])


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (["--attest"], 2),
        (["--key", "x.key"], 2),
        (["--local"], 2),
        (["--attest", "--key", "x.key", "--local", "--clean"], 2),
        (["--attest", "--key", "no-such.key"], 3),
    ],
)
def test_options_that_do_not_fit(more: list[str], code: int) -> None:
    # This fails before the model, which does not exist, is searched.
    assert run(["smoke", "127.0.0.1:1/team/none:v1", *more]) == code
