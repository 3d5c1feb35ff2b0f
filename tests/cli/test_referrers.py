"""`attach`, `referrers`, `detach` and `--with-referrers`."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelpack.testing import registry
from tests.cli.running import modelpack, succeed
from tests.models import tiny_gguf
from tests.operations.conftest import Published
from tests.operations.conftest import published as published

KIND = "application/vnd.example.evaluation"


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "report.json"
    path.write_text('{"score": 1}')
    return path


def test_attach_referrers_detach(published: Published, report: Path) -> None:
    name = published.reference
    made = succeed(
        "attach", name, f"{report}:application/json", "--artifact-type", KIND,
        "--annotation", "suite=small",
    )  # fmt: skip
    assert f"attached 1 file to {name}" in made.err
    [one] = succeed("referrers", name, "--json").json["referrers"]
    assert one["digest"] == made.out
    assert one["artifactType"] == KIND
    assert one["annotations"] == {"suite": "small"}
    assert made.out in succeed("referrers", name, "--artifact-type", KIND).out
    assert succeed("referrers", name, "--artifact-type", "a/b", "--json").json["referrers"] == []
    repository = name.rpartition(":")[0]
    assert succeed("detach", f"{repository}@{made.out}").out == made.out
    assert succeed("referrers", name, "--json").json["referrers"] == []


def test_referrers_of_an_id_are_those_in_the_store(report: Path, tmp_path: Path) -> None:
    digest = succeed("package", "--gguf", tiny_gguf(tmp_path), "tiny:v1").out
    exported = succeed("export", "tiny:v1", "-o", tmp_path / "without.tar")
    assert "left out" not in exported.err
    made = succeed("attach", "tiny:v1", report, "--artifact-type", KIND, "--local")
    exported = succeed("export", "tiny:v1", "-o", tmp_path / "model.tar")
    assert "left out: 1 attached manifest, such as signatures" in exported.err
    encoded = digest.removeprefix("sha256:")
    for name in (encoded[:6], encoded[:12], digest):
        for local in ([], ["--local"]):
            result = succeed("referrers", name, "--json", *local)
            assert result.json["reference"] is None
            assert [one["digest"] for one in result.json["referrers"]] == [made.out]
            assert (f"{name} is the stored model {digest}" in result.err) == (name != digest)
    absent = modelpack("referrers", "aaaaaaa", "--local")
    assert absent.code == 3


def test_an_id_names_no_registry(
    report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COSIGN_PASSWORD", "secret")
    digest = succeed("package", "--gguf", tiny_gguf(tmp_path), "tiny:v1").out
    succeed("keygen", tmp_path / "ours")
    for name in (digest[7:13], digest[7:19], digest):
        for arguments in (
            ["attach", name, report, "--artifact-type", KIND],
            ["sign", name, "--key", tmp_path / "ours.key"],
        ):
            refused = modelpack(*arguments)
            assert refused.code == 2
            assert f"error: {name}: an id does not name a registry" in refused.err
            assert "docker.io" not in refused.err


@pytest.mark.parametrize("command", [["referrers"], ["pull"], ["verify", "--key", "ours.pub"]])
def test_an_unknown_digest_is_no_name(command: list[str]) -> None:
    digest = f"sha256:{'a' * 64}"
    refused = modelpack(*command, digest)
    assert refused.code == 2
    assert f"error: {digest}: a digest does not name a model in a registry" in refused.err
    assert f"hint: type NAME@{digest}" in refused.err


def test_with_referrers(published: Published, report: Path, tmp_path: Path) -> None:
    name = published.reference
    digest = succeed("attach", name, report, "--artifact-type", KIND).out
    with registry(tmp_path / "other") as other:
        copied = succeed("copy", "--json", "--with-referrers", name, f"{other.host}/x/y:v1")
        assert copied.json["referrers"] == [digest]
        assert "with 1 attached manifest" in copied.err
        assert digest in succeed("referrers", f"{other.host}/x/y:v1").out
        assert succeed("pull", "--json", "--with-referrers", name).json["referrers"] == [digest]
        assert digest in succeed("referrers", "--local", name).out
        pushed = succeed("push", "--json", "--with-referrers", name, "--to", f"{other.host}/x/z:v1")
        assert pushed.json["referrers"] == [digest]
    local = succeed("attach", "--local", name, "--artifact-type", KIND, "--annotation", "a=b").out
    listed = succeed("referrers", "--local", "--json", name).json["referrers"]
    assert {one["digest"] for one in listed} == {digest, local}
    succeed("detach", "--local", f"{name.rpartition(':')[0]}@{local}")
    assert local not in succeed("referrers", "--local", name).out


@pytest.mark.parametrize(
    "arguments",
    [
        ["attach", "m:v1", "--artifact-type", "a/b"],
        ["attach", "m:v1", "file"],
        ["attach", "m:v1", "--artifact-type", "nonsense", "--annotation", "a=b"],
        ["detach", "m:v1"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    assert modelpack(*arguments).code == 2
