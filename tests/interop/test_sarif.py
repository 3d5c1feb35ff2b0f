"""What `modelpack lint --format sarif` writes is SARIF 2.1.0, by the schema that OASIS publishes.

The schema comes out of a Go module that carries it; from the site itself it could not be fetched.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from modelpack.lint.checks import SCHEMA
from tests.cli.running import modelpack
from tests.interop.go_tool import go_module_file
from tests.models import tiny_safetensors
from tests.peers import require

pytestmark = pytest.mark.peer("go")


@pytest.fixture(scope="module")
def schema() -> Any:
    require("go")
    source = go_module_file(
        "github.com/owenrumney/go-sarif/v3",
        "v3.3.1",
        "h1:bKY8YnWcY8zYTiGVObC5wZLlfEvMkCxK9XMGXBbzEtQ=",
        "pkg/report/v210/sarif/schema.go",
    ).decode()
    return json.loads(source.partition("const schema = `")[2].rpartition("`")[0])


def test_findings_are_sarif(schema: Any, tmp_path: Path) -> None:
    directory = tiny_safetensors(tmp_path)
    (directory / "a b.json").write_text('\n"/home/ann/x"')
    (directory / "model.bin").write_bytes(b"\x80\x04.")
    log = modelpack("lint", directory, "--format", "sarif").json
    assert len(log["runs"][0]["results"]) > 1
    assert log["$schema"] == schema["id"] == SCHEMA
    check = jsonschema.Draft4Validator(schema)
    check.validate(log)
    log["runs"][0]["results"][0]["level"] = "bad"
    assert not check.is_valid(log)
