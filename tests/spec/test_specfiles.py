"""The documents and schemas are found, from the source tree and from a wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelpack import specfiles
from modelpack.errors import ModelpackError, UsageError

SPEC = Path(__file__).resolve().parents[2] / "spec"


@pytest.fixture
def uncached() -> Iterator[None]:
    """Clear the cached location of the files before and after the test."""
    for remembered in (specfiles._root, specfiles._registry):
        remembered.cache_clear()
    yield
    for remembered in (specfiles._root, specfiles._registry):
        remembered.cache_clear()


def test_names_are_those_of_the_files() -> None:
    assert set(specfiles.schema_names()) >= {
        "manifest",
        "docker-config-v0.1",
        "docker-config-v0.2",
        "cncf-config",
        "layer-metadata",
    }
    assert len(specfiles.schema_names()) == len(list((SPEC / "schema").iterdir()))
    assert set(specfiles.document_names()) == {path.stem for path in SPEC.glob("*.md")}


def test_document_is_the_text_of_a_page() -> None:
    assert specfiles.document("manifest") == (SPEC / "manifest.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["nothing", "", "../pyproject", "manifest.schema.json"])
def test_an_unknown_name_is_an_error_that_lists_the_known_ones(name: str) -> None:
    for call in (specfiles.schema, specfiles.document, specfiles.validator):
        with pytest.raises(UsageError) as caught:
            call(name)
        assert "manifest" in (caught.value.hint or "")


def test_a_schema_is_the_callers_own() -> None:
    specfiles.schema("manifest").clear()
    assert specfiles.schema("manifest")["$id"] == "manifest.schema.json"


@pytest.mark.parametrize(("value", "valid"), [(2, True), (2.0, False), (True, False)])
def test_a_whole_number_is_written_as_one(value: object, valid: bool) -> None:
    document = {"schemaVersion": value, "manifests": []}
    assert specfiles.validator("index").is_valid(document) is valid


@pytest.mark.usefixtures("uncached")
def test_a_wheel_carries_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(SPEC, tmp_path / "_spec")
    (tmp_path / "_spec" / "only-here.md").write_text("# Here\n")
    monkeypatch.setattr(specfiles, "files", lambda package: tmp_path)
    assert specfiles.document("only-here") == "# Here\n"
    assert specfiles.validator("oci-layout").is_valid({"imageLayoutVersion": "1.0.0"})


@pytest.mark.usefixtures("uncached")
def test_missing_files_are_an_error_with_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specfiles, "files", lambda package: tmp_path)
    monkeypatch.setattr(specfiles, "__file__", str(tmp_path / "modelpack" / "specfiles.py"))
    with pytest.raises(ModelpackError) as caught:
        specfiles.schema_names()
    assert "reinstall" in (caught.value.hint or "")


def test_importing_it_loads_no_validator() -> None:
    code = "import sys, modelpack.specfiles; sys.exit('jsonschema' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SPEC.parent, timeout=30)
