"""Precision, licences, authors and data sets in the config of a CNCF model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from modelpack import specfiles
from modelpack.artifacts import media_types
from modelpack.builder.request import PackageRequest
from tests.cli.running import succeed
from tests.packaging.trees import DDUF, MIT, PAIR, TINY, TINY_DIRECTORY, package, write

HUB = "https://huggingface.co/datasets/"
CARD = """---
license: other
license_name: Team Licence
datasets: [team/set, squad, "our own"]
authors: [Ada]
---
"""


def fields(made: Any) -> dict[str, Any]:
    """Return the fields beside statistics and capabilities, after the schema accepted all."""
    found = json.loads(made.config_bytes)
    specfiles.validator("cncf-config").validate(found)
    wanted = ("authors", "licenses", "datasetsURL")
    said = {key: found["descriptor"][key] for key in wanted if key in found["descriptor"]}
    return said | {key: found["config"][key] for key in ("precision",) if key in found["config"]}


#: Files beside a safetensors file whose tensors have two types, and what the config says.
DIRECTORIES: list[tuple[dict[str, str], dict[str, Any]]] = [
    ({}, {}),
    ({"config.json": '{"dtype": "bfloat16"}'}, {"precision": "bfloat16"}),
    ({"config.json": '{"torch_dtype": "float16"}'}, {"precision": "float16"}),
    ({"config.json": '{"torch_dtype": "torch.float8_e4m3fn"}'}, {"precision": "float8_e4m3"}),
    ({"config.json": '{"text_config": {"dtype": "float32"}}'}, {"precision": "float32"}),
    ({"config.json": '{"dtype": "int3"}'}, {}),
    ({"config.json": '{"dtype": ["bfloat16"]}'}, {}),
    ({"config.json": "[]"}, {}),
    (
        {"README.md": CARD},
        {
            "authors": ["Ada"],
            "licenses": ["LicenseRef-Team-Licence"],
            "datasetsURL": [f"{HUB}team/set", f"{HUB}squad", "our own"],
        },
    ),
    ({"README.md": "---\nlicense: apache-2.0\n---\n"}, {"licenses": ["Apache-2.0"]}),
    ({"README.md": "---\nlicense: other\n---\n"}, {"licenses": ["LicenseRef-other"]}),
    ({"README.md": "---\nlicense: [\n---\n"}, {}),
    ({"sub/README.md": CARD}, {}),  # a card of something else
    ({"LICENSE": "MIT\n"}, {"licenses": ["MIT"]}),
    ({"LICENSE": "MIT\n", "NOTICE": "MIT\n"}, {"licenses": ["MIT"]}),
    ({"LICENSE": "All rights reserved.\n"}, {}),
    ({"LICENSE": "MIT\n", "README.md": "---\nlicense: gemma\n---\n"},
     {"licenses": ["LicenseRef-Gemma"]}),
]  # fmt: skip


@pytest.mark.parametrize(("files", "expected"), DIRECTORIES)
def test_directories(files: dict[str, str], expected: dict[str, Any], tmp_path: Path) -> None:
    texts = {name: text.encode() for name, text in files.items()}
    write(tmp_path, {"model.safetensors": PAIR, **texts})
    request = PackageRequest(safetensors_dir=tmp_path, format="cncf")
    assert fields(package(request)) == expected
    assert fields(package(replace(request, preserve=True))) == {}  # Docker Model Runner's bytes


def test_one_type_of_all_weights_is_the_precision(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"a": np.zeros((2, 2), np.float16)}, tmp_path / "model.safetensors")
    made = package(PackageRequest(safetensors_dir=tmp_path, format="cncf"))
    assert fields(made) == {"precision": "float16"}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, {}),
        ({"general.file_type": 0}, {"precision": "float32"}),
        ({"general.file_type": 1}, {"precision": "float16"}),
        ({"general.file_type": 32}, {"precision": "bfloat16"}),
        ({"general.file_type": 15}, {}),  # Q4_K_M
        ({"general.author": " Ada ", "general.license": "mit"},
         {"authors": ["Ada"], "licenses": ["MIT"]}),
        ({"general.license": "other", "general.license.name": "tongyi-qianwen"},
         {"licenses": ["LicenseRef-tongyi-qianwen"]}),
        ({"general.license": "other"}, {"licenses": ["LicenseRef-other"]}),
        ({"general.datasets": ["team/set", "our own"]},
         {"datasetsURL": [f"{HUB}team/set", "our own"]}),
        (
            {
                "general.dataset.0.repo_url": "https://data.example/a",
                "general.dataset.1.name": "set", "general.dataset.1.organization": "team",
                "general.dataset.3.name": "after a gap",
            },
            {"datasetsURL": ["https://data.example/a", f"{HUB}team/set"]},
        ),
    ],
)  # fmt: skip
def test_gguf(metadata: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.add_tensor("a", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = package(PackageRequest(gguf=tmp_path / "m.gguf", format="cncf"))
    assert fields(made) == expected


def test_layers_have_titles_in_cncf_only(tmp_path: Path) -> None:
    write(tmp_path / "d", TINY_DIRECTORY)
    write(tmp_path, {"m.gguf": TINY, "x.dduf": DDUF, "LICENSE": MIT})
    for request in (
        PackageRequest(safetensors_dir=tmp_path / "d"),
        PackageRequest(gguf=tmp_path / "m.gguf", licenses=(tmp_path / "LICENSE",)),
        PackageRequest(dduf=tmp_path / "x.dduf"),
    ):
        made = package(replace(request, format="cncf"))
        assert [one.annotations[media_types.TITLE] for one in made.manifest.layers] == [
            one.filepath for one in made.manifest.layers
        ]
        for other in (request, replace(request, format="cncf", preserve=True)):
            layers = package(other).manifest.layers
            assert not any(media_types.TITLE in one.annotations for one in layers)


def test_inspect_shows_them(tmp_path: Path) -> None:
    write(tmp_path / "d", {"model.safetensors": PAIR, "README.md": CARD.encode()})
    store = ("--store", tmp_path / "store")
    succeed("package", "--safetensors-dir", tmp_path / "d", "--format", "cncf", "team/tiny", *store)
    text = succeed("inspect", "team/tiny", *store).out
    assert "Authors:      Ada\n" in text
    assert "Licences:     LicenseRef-Team-Licence\n" in text
    value = succeed("inspect", "team/tiny", "--json", *store).json["config"]
    assert value["licences"] == ["LicenseRef-Team-Licence"]
    assert value["datasets"] == [f"{HUB}team/set", f"{HUB}squad", "our own"]
    assert (value["authors"], value["precision"]) == (["Ada"], None)
