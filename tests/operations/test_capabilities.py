"""The capabilities of models in Docker's format, which are those of CNCF's config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import modelpack
from modelpack.operations.capabilities import capabilities_of
from modelpack.operations.lookup import model_in
from modelpack.operations.pull import Selection
from modelpack.operations.remote import RemoteOptions, open_repository
from modelpack.storage import watching
from modelpack.testing import registry
from tests.cli.running import succeed
from tests.operations.conftest import Records
from tests.packaging.test_capabilities import DIRECTORIES, TEXT, THINKS, TOOLS, made_gguf
from tests.packaging.trees import DDUF, PAIR, write

#: The metadata of a GGUF file, that of its projector, a template, and what differs from plain text.
Case = tuple[dict[str, Any], dict[str, Any] | None, str, dict[str, Any]]
MODELS: list[Case] = [
    ({}, None, "", {}),
    ({"tokenizer__chat_template": TOOLS}, None, "", {"reasoning": False, "toolUsage": True}),
    ({"tokenizer__chat_template": TOOLS}, None, THINKS, {"reasoning": True, "toolUsage": False}),
    ({"llama__pooling_type": 3}, None, "", {"outputTypes": ["embedding"]}),
    ({"llama__x": "9" * 5000}, None, "", {}),
    ({}, {}, "", {"inputTypes": ["text", "image"]}),
    ({}, {"clip__has_audio_encoder": True}, "", {"inputTypes": ["text", "audio"]}),
]


def request_of(root: Path, case: Case, **options: Any) -> modelpack.PackageRequest:
    metadata, projector, template, _ = case
    files: dict[str, Any] = {"gguf": made_gguf(root / "m.gguf", "llama", **metadata)}
    if projector is not None:
        files["mmproj"] = made_gguf(root / "p.gguf", "clip", **projector)
    if template:
        files["chat_template"] = write(root, {"t.jinja": template.encode()}) / "t.jinja"
    return modelpack.PackageRequest(**files, **options)


def found(root: Path, request: modelpack.PackageRequest) -> Mapping[str, Any]:
    store = modelpack.Store(root / "store")
    modelpack.package("m", request, store=store)
    model = modelpack.inspect("m", store=store)
    assert model.config.cncf_config == {}
    return capabilities_of(model, store)


@pytest.mark.parametrize("case", MODELS)
def test_gguf(case: Case, tmp_path: Path) -> None:
    assert found(tmp_path, request_of(tmp_path, case)) == TEXT | case[-1]


def test_a_projector_whose_header_goes_on(tmp_path: Path) -> None:
    assert found(tmp_path, request_of(tmp_path, ({}, {"clip__x": "a" * 1_900_000}, "", {}))) == {}


@pytest.mark.parametrize(("config", "files", "expected"), DIRECTORIES)
def test_safetensors(
    config: dict[str, Any], files: dict[str, str], expected: dict[str, Any], tmp_path: Path
) -> None:
    texts = {"config.json": json.dumps(config), **files}
    write(tmp_path / "d", {"model.safetensors": PAIR, **{k: v.encode() for k, v in texts.items()}})
    request = modelpack.PackageRequest(safetensors_dir=tmp_path / "d")
    assert found(tmp_path, request) == TEXT | expected


def test_dduf(tmp_path: Path) -> None:
    write(tmp_path, {"x.dduf": DDUF})
    request = modelpack.PackageRequest(dduf=tmp_path / "x.dduf")
    assert found(tmp_path, request) == {"inputTypes": ["text"], "outputTypes": ["image"]}


def test_weights_are_not_read(tmp_path: Path) -> None:
    """From a registry, and of a model that is stored in part."""
    big = tmp_path / "d" / "model.safetensors"
    write(tmp_path / "d", {"config.json": b'{"image_token_id": 5}', "t.jinja": TOOLS.encode()})
    header = b'{"w":{"dtype":"U8","shape":[8388608],"data_offsets":[0,8388608]}}'
    big.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8 << 20))
    request, records = modelpack.PackageRequest(safetensors_dir=big.parent), Records()
    with registry(on_request=records.add) as server:
        name = f"{server.host}/team/m:v1"
        modelpack.package(name, request, push=True, store=modelpack.Store(tmp_path / "origin"))
        records.forget(server)
        reference = modelpack.Reference.parse(name)
        with open_repository(reference, RemoteOptions(), watching(None)) as repository:
            there = capabilities_of(model_in(repository, reference), repository)
        assert sum(record.sent for record in records.settled(server)) < 16 * 1024
        store = modelpack.Store(tmp_path / "store")
        modelpack.pull(name, selection=Selection(exclude=("*.safetensors",)), store=store)
    inputs = {"inputTypes": ["text", "image"], "reasoning": False, "toolUsage": True}
    assert there == TEXT | inputs
    assert capabilities_of(modelpack.inspect(name, store=store), store) == there


def test_inspecting_a_remote_model_says_what_its_config_does(tmp_path: Path) -> None:
    """A template in a file is not read; what a projector or safetensors take is not known."""
    told = {"reasoning": False, "toolUsage": True}
    cases = [(MODELS[1], TEXT | told), (MODELS[2], TEXT), (MODELS[5], None), (MODELS[6], None)]
    store = modelpack.Store(tmp_path / "store")
    with registry() as server:
        name = f"{server.host}/team/m:v1"
        for case, expected in cases:
            modelpack.package(name, request_of(tmp_path, case), push=True, store=store)
            shown = succeed("inspect", "--remote", name, "--json").json
            assert shown["config"]["capabilities"] == expected
        write(tmp_path / "d", {"model.safetensors": PAIR, "config.json": b'{"image_token_id": 5}'})
        request = modelpack.PackageRequest(safetensors_dir=tmp_path / "d")
        modelpack.package(name, request, push=True, store=store)
        assert succeed("inspect", "--remote", name, "--json").json["config"]["capabilities"] is None
