"""Ollama's MLX models, a layer for each tensor: read from its directory, joined and refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import modelpack
from modelpack.artifacts import media_types as mt
from modelpack.artifacts.digest import Digest
from modelpack.errors import (
    DigestMismatchError,
    FormatError,
    ManifestError,
    ModelpackError,
    NotFoundError,
    StoreError,
    UnsafePathError,
    UnsupportedError,
    WeightFormatError,
)
from modelpack.operations.convert import convert
from modelpack.operations.docker import import_from_ollama
from modelpack.operations.headers import read_headers
from modelpack.store.ollama_store import OllamaStore, default_ollama_root, ollama_reference
from modelpack.testing import registry
from modelpack.trust.model_signing import model_statement
from tests.cli.running import modelpack as command
from tests.cli.running import succeed
from tests.ollama import Layer, Tensors, blob, document, tensor, write_ollama
from tests.operations.test_foreign import push_as

NAME = "registry.ollama.ai/library/tiny/mlx"
REF = "registry.ollama.ai/library/tiny:mlx"
Q = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
CONFIG = document("config.json", {"model_type": "llama", "quantization_config": {"old": 1}})


def quantised(name: str = Q, **changes: tuple[str, tuple[int, ...], bytes]) -> Tensors:
    """Return a tensor of 2 x 64 weights in int4, in groups of 32, with some parts replaced."""
    parts = {
        "": ("U32", (2, 8), bytes(64)),
        ".scale": ("BF16", (2, 2), b"\x80\x3f" * 4),
        ".bias": ("BF16", (2, 2), bytes(8)),
    } | {f".{key}" if key != "weight" else "": value for key, value in changes.items()}
    return {name + part: value for part, value in parts.items() if value[1]}


INT4 = {"quant_type": "int4", "group_size": "32"}
PLAIN: Tensors = {NORM: ("F32", (2,), b"\x00\x00\x80\x3f" * 2)}
LAYERS: list[Layer] = [
    tensor(NORM, PLAIN),
    tensor(Q, quantised(), INT4),
    CONFIG,
    document("tokenizer_config.json", {"chat_template": "{{ messages }}"}),
    (mt.OLLAMA_LICENSE, None, b"MIT"),
    (mt.OLLAMA_PARAMS, None, b'{"temperature": 0.5}'),
]


@pytest.fixture
def ollama(tmp_path: Path) -> Path:
    return tmp_path / "ollama"


@pytest.fixture
def store(tmp_path: Path) -> modelpack.Store:
    return modelpack.Store(tmp_path / "store")


def kept(ollama: Path, store: modelpack.Store, layers: list[Layer], **config: Any) -> Digest:
    digest = write_ollama(ollama, NAME, layers, **config)
    [done] = import_from_ollama(["tiny:mlx"], ollama=OllamaStore(ollama), store=store)
    assert (done.digest, done.references) == (digest, (REF,))
    return digest


def test_tensors_are_joined_as_mlx_lm_reads_them(
    ollama: Path, store: modelpack.Store, tmp_path: Path
) -> None:
    kept(ollama, store, LAYERS, file_type="int4")
    model = modelpack.inspect(REF, store=store)
    assert (model.config.format, model.config.quantization) == ("safetensors", "int4")
    assert [file.filepath for file in model.files()] == [
        NORM, Q, "config.json", "tokenizer_config.json", "LICENSE", "params.json"
    ]  # fmt: skip
    bundle = modelpack.bundle(REF, tmp_path / "bundle", store=store)
    assert bundle.weight == tmp_path / "bundle/model/model.safetensors"
    with safe_open(bundle.weight, "np") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        assert weights.get_tensor(NORM).tolist() == [1, 1]
    up = Q.removesuffix(".weight")
    assert shapes == {NORM: [2], Q: [2, 8], f"{up}.scales": [2, 2], f"{up}.biases": [2, 2]}
    config = json.loads((tmp_path / "bundle/model/config.json").read_text())
    described = {"group_size": 32, "bits": 4, "mode": "affine"}
    assert config == {
        "model_type": "llama", "quantization": described, "quantization_config": described
    }  # fmt: skip
    [weight] = modelpack.resolve(REF, store=store).files
    assert weight.path.read_bytes() == bundle.weight.read_bytes()
    [header] = read_headers(REF, store=store)
    assert len(header.header.tensors) == 4


def test_a_statement_over_files_cannot_cover_tensors(ollama: Path, store: modelpack.Store) -> None:
    kept(ollama, store, LAYERS)
    with pytest.raises(UnsupportedError, match="has tensor layers, whose files have no digests"):
        model_statement(modelpack.inspect(REF, store=store), "tiny")


def test_a_registry_a_conversion_and_a_removal(
    ollama: Path, store: modelpack.Store, tmp_path: Path
) -> None:
    digest = kept(ollama, store, LAYERS)
    mine = modelpack.Store(tmp_path / "mine")
    with registry(tmp_path / "registry") as server:
        pushed = push_as(store, REF, f"{server.host}/library/tiny:mlx")
        assert modelpack.pull(pushed, store=mine).digest == digest
        assert Q in succeed("inspect", pushed, "--remote").out
        with pytest.raises(UnsupportedError, match="a layer for each tensor"):
            read_headers(pushed, from_registry=True)
    made = convert(pushed, "x/docker:v1", to="docker", store=mine)
    assert convert(pushed, "x/again:v1", to="docker", store=mine).digest == made.digest
    converted = modelpack.inspect("x/docker:v1", store=mine)
    assert [file.filepath for file in converted.files()] == [
        "LICENSE", "config.json", "model.safetensors", "tokenizer_config.json"
    ]  # fmt: skip
    assert json.loads(converted.manifest.annotations[mt.DEFAULTS]) == {
        "parameters": {"temperature": 0.5}
    }
    modelpack.resolve(pushed, store=mine)
    assert list((mine.root / "bundles").iterdir())
    mine.remove(pushed)
    assert list((mine.root / "bundles").iterdir()) == []


def test_types_and_groups_that_differ(ollama: Path, store: modelpack.Store, tmp_path: Path) -> None:
    """The usual ones describe the model, and others their modules."""
    other = "model.layers.1.mlp.up_proj"
    third = "model.layers.2.mlp.up_proj"
    experts = "model.layers.3.mlp.experts"
    eight: Tensors = {
        f"{other}.weight": ("U32", (2, 16), bytes(128)),
        f"{other}.weight.scale": ("U8", (2, 2), bytes(4)),
    }
    grouped = {
        **quantised(f"{experts}.gate_proj.weight"),
        f"{experts}.down_proj.weight": ("BF16", (1, 2, 2), bytes(8)),
    }
    metadata = {f"{experts}.gate_proj.weight.quant_type": "int4",
                f"{experts}.gate_proj.weight.group_size": "32"}  # fmt: skip
    kept(ollama, store, [
        CONFIG,
        tensor(Q, quantised(), INT4),
        tensor(f"{third}.weight", quantised(f"{third}.weight"), INT4),
        tensor(f"{other}.weight", eight, {"quant_type": "mxfp8"}),
        tensor(experts, grouped, metadata),
        tensor("draft.norm.weight", {"draft.norm.weight": ("F32", (1,), bytes(4))}),
    ])  # fmt: skip
    bundle = modelpack.bundle(REF, tmp_path / "bundle", store=store)
    assert bundle.notes == ("the draft model is left out: 1 layers named draft.*",)
    config = json.loads((tmp_path / "bundle/model/config.json").read_text())
    assert config["quantization"] == {
        "group_size": 32, "bits": 4, "mode": "affine",
        other: {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    }  # fmt: skip
    with safe_open(bundle.weight, "np") as weights:
        switch = [name for name in weights.keys() if "switch_mlp" in name]  # noqa: SIM118
    assert sorted(name.rpartition("switch_mlp.")[2] for name in switch) == [
        "down_proj.weight", "gate_proj.biases", "gate_proj.scales", "gate_proj.weight"
    ]  # fmt: skip


def test_what_mlx_lm_quantised_keeps_its_own_description(
    ollama: Path, store: modelpack.Store, tmp_path: Path
) -> None:
    """Ollama writes the type of the whole model into each layer, also for other bits."""
    stated = {"group_size": 32, "bits": 4}
    six: Tensors = {
        "lm_head.weight": ("U32", (2, 12), bytes(96)),
        "lm_head.weight.scale": ("F16", (2, 1), bytes(4)),
        "lm_head.weight.bias": ("F16", (2, 1), bytes(4)),
    }
    stated_six = {"group_size": 64, "bits": 6}
    kept(ollama, store, [
        document("config.json", {"quantization": {**stated, "lm_head": stated_six}}),
        tensor(Q, quantised(), {"quant_type": "int4", "group_size": "32"}),
        tensor("lm_head.weight", six, {"quant_type": "int4", "group_size": "32"}),
    ])  # fmt: skip
    modelpack.bundle(REF, tmp_path / "bundle", store=store)
    config = json.loads((tmp_path / "bundle/model/config.json").read_text())
    assert config["quantization"]["lm_head"] == {**stated_six, "mode": "affine"}


U32 = ("U32", (2, 8), bytes(64))
SCALE = ("BF16", (2, 2), bytes(8))
GONE = ("", (), b"")
BAD: list[tuple[str, list[Layer], type[ModelpackError], str]] = [
    ("no config", [tensor(NORM, PLAIN)], ManifestError, "tensors, but no config.json"),
    ("another name", [CONFIG, tensor("x", PLAIN)], ManifestError, "layer 'x' contains 'model.norm"),
    ("one more", [CONFIG, tensor(NORM, {**PLAIN, "y": ("U8", (0,), b"")})], ManifestError, "'y'"),
    ("no tensor", [CONFIG, tensor("x", {})], ManifestError, "contains no tensor"),
    ("twice", [CONFIG, tensor(NORM, PLAIN), tensor(NORM, PLAIN, {"a": "b"})], ManifestError,
     "'model.norm.weight' twice"),
    ("not safetensors", [CONFIG, (mt.OLLAMA_TENSOR, "x", b"GGUF" * 9)], WeightFormatError, "x"),
    ("truncated", [CONFIG, (mt.OLLAMA_TENSOR, NORM, blob(PLAIN)[:-1])], WeightFormatError,
     "ends too early"),
    ("a picture's", [CONFIG, tensor("vae/x", {"vae/x": ("F32", (0,), b"")})], UnsupportedError,
     "generates images"),
    ("wrong dtype", [CONFIG, tensor(Q, quantised(weight=("I32", *U32[1:])), INT4)],
     WeightFormatError, "type I32, not U32"),
    ("wrong scales", [CONFIG, tensor(Q, quantised(scale=("U8", (2, 2), bytes(4))), INT4)],
     WeightFormatError, "scales of type U8"),
    ("other shapes", [CONFIG, tensor(Q, quantised(scale=("F16", (2, 3), bytes(12))), INT4)],
     WeightFormatError, r"shapes \[2, 8\] and \[2, 3\]"),
    ("other rows", [CONFIG, tensor(Q, quantised(scale=("F16", (1, 2), bytes(4))), INT4)],
     WeightFormatError, r"\[1, 2\]"),
    ("no dimension", [CONFIG, tensor(Q, {Q: ("U32", (), bytes(4)), Q + ".scale": SCALE}, INT4)],
     WeightFormatError, r"\[\]"),
    ("no bias", [CONFIG, tensor(Q, quantised(bias=GONE), INT4)], WeightFormatError, "no bias"),
    ("other bias", [CONFIG, tensor(Q, quantised(bias=("F16", (2, 2), bytes(8))), INT4)],
     WeightFormatError, "bias of another shape or type"),
    ("a bias too many", [CONFIG, tensor(
        Q, quantised(scale=("U8", (2, 2), bytes(4))), {"quant_type": "mxfp4"})],
     WeightFormatError, "a bias in mode mxfp4"),
    ("only a scale", [CONFIG, tensor("a.weight.scale", {"a.weight.scale": SCALE})],
     WeightFormatError, "is missing"),
    ("only a bias", [CONFIG, tensor(Q, quantised(scale=GONE), INT4)], WeightFormatError,
     "no scale"),
    ("no weight", [CONFIG, tensor("a.b", quantised("a.b"), INT4)], WeightFormatError,
     "not called weight"),
    ("unknown type", [CONFIG, tensor(Q, quantised(), {"quant_type": "int3"})], UnsupportedError,
     "quantisation 'int3'"),
    ("no type", [CONFIG, tensor(Q, quantised())], UnsupportedError, "quantisation ''"),
    ("groups of 1", [CONFIG, tensor(Q, quantised(), {**INT4, "group_size": "1"})],
     WeightFormatError, "groups of 1"),
    ("groups of 5,000 digits", [CONFIG, tensor(Q, quantised(), {**INT4, "group_size": "9" * 5000})],
     WeightFormatError, "groups of 9"),
    ("an empty scale", [CONFIG, tensor(Q, quantised(scale=("BF16", (2, 0), b"")), INT4)],
     WeightFormatError, r"shapes \[2, 8\] and \[2, 0\]"),
    ("a mode that is no text", [
        document("config.json", {"quantization": {"group_size": 32, "mode": []}}),
        tensor(Q, quantised(), INT4)], WeightFormatError, r"has the mode '\[\]'"),
    ("a global scale", [CONFIG, tensor(
        Q, quantised(global_scale=("F32", (1,), bytes(4))), INT4)],
     UnsupportedError, "scale for the whole tensor"),
    ("config is no object", [(mt.OLLAMA_JSON, "config.json", b"[1]"), tensor(NORM, PLAIN)],
     ManifestError, "config.json"),
    ("a path", [CONFIG, tensor("../x", {"../x": ("F32", (0,), b"")})], UnsafePathError,
     r"leaves the directory"),
    ("a path of JSON", [(mt.OLLAMA_JSON, "/etc/x.json", b"{}"), CONFIG], UnsafePathError,
     "absolute"),
]  # fmt: skip


@pytest.mark.sample(9)
@pytest.mark.parametrize(
    ("layers", "kind", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_damaged_models_are_refused(
    ollama: Path,
    store: modelpack.Store,
    tmp_path: Path,
    layers: list[Layer],
    kind: type[ModelpackError],
    message: str,
) -> None:
    kept(ollama, store, layers)
    with pytest.raises(kind, match=message):
        modelpack.bundle(REF, tmp_path / "bundle", store=store)
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(kind, match=message):
        convert(REF, "x/made:v1", to="docker", store=store)
    assert not list(store.root.glob("bundles/*"))


@pytest.mark.parametrize("name", [None, "", 1])
def test_a_tensor_needs_a_name(ollama: Path, store: modelpack.Store, name: Any) -> None:
    write_ollama(ollama, NAME, [CONFIG, (mt.OLLAMA_TENSOR, name, blob(PLAIN))])
    with pytest.raises(FormatError, match=r"layers\[1\]\.name: is .*, expected the name"):
        import_from_ollama(["tiny:mlx"], ollama=OllamaStore(ollama), store=store)


# The directory


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("llama3", "registry.ollama.ai/library/llama3:latest"),
        ("llama3:8b", "registry.ollama.ai/library/llama3:8b"),
        ("me/Tiny", "registry.ollama.ai/me/tiny:latest"),
        ("hf.co/Org/M:Q4", "huggingface.co/org/m:Q4"),
    ],
)
def test_names_are_those_of_ollama(name: str, reference: str) -> None:
    assert str(ollama_reference(name)) == reference


def test_the_command_imports_one_or_all(
    ollama: Path, store: modelpack.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_ollama(ollama, NAME, LAYERS)
    write_ollama(ollama, "hf.co/Org/Model/Q4", LAYERS)  # the same model
    write_ollama(ollama, "registry.ollama.ai/library/gguf/latest", [(mt.OLLAMA_MODEL, None, b"G")])
    (ollama / "manifests/registry.ollama.ai/library/tiny/bad").write_text("{")
    (ollama / "manifests/registry.ollama.ai/library/tiny/.hidden").write_text("{}")
    assert default_ollama_root() == Path.home() / ".ollama" / "models"
    monkeypatch.setenv("OLLAMA_MODELS", str(ollama))
    one = succeed("import", "--ollama-store", "tiny:mlx", "--store", store.root)
    assert one.out.startswith("sha256:")
    done = succeed("import", "--ollama-store", ollama, "--all", "--json", "--store", store.root)
    found = [model["references"] for model in done.json["models"]]
    assert found == [
        ["huggingface.co/org/model:Q4", REF],
        ["registry.ollama.ai/library/gguf:latest"],
    ]
    assert {str(ref) for model in store.models() for ref in model.references} == {
        "huggingface.co/org/model:Q4", REF, "registry.ollama.ai/library/gguf:latest"
    }  # fmt: skip
    # Blobs are shared with Ollama, or copied on request.
    [weight] = {path for path in (ollama / "blobs").iterdir() if path.read_bytes() == b"G"}
    assert weight.stat().st_nlink == 2


def test_what_of_a_directory_is_refused(
    ollama: Path, store: modelpack.Store, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match="no models of Ollama at"):
        OllamaStore(tmp_path)
    digest = write_ollama(ollama, NAME, LAYERS)
    models = OllamaStore(ollama)
    with pytest.raises(NotFoundError, match=r"tiny:other is not in Ollama's models"):
        models.resolve("tiny:other")
    with pytest.raises(DigestMismatchError):
        models.resolve(f"tiny:mlx@{Digest.of(b'other')}")
    assert models.resolve(f"tiny:mlx@{digest}").digest == digest
    assert models.resolve("TINY:MLX").digest == digest
    path = models.blob_path(Digest.of(blob(PLAIN)))
    path.write_bytes(bytes(len(blob(PLAIN))))
    with pytest.raises(DigestMismatchError):
        import_from_ollama(["tiny:mlx"], ollama=models, store=store)
    path.unlink()
    with pytest.raises(NotFoundError, match="is not in Ollama's models"):
        import_from_ollama(["tiny:mlx"], ollama=models, store=store)
    outside = tmp_path / "secret"
    outside.write_bytes(blob(PLAIN))
    os.symlink(outside, path)
    with pytest.raises(UnsafePathError, match="points outside"):
        import_from_ollama(["tiny:mlx"], ollama=models, store=store)
    assert store.models() == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ollama-store", "x", "--docker-store"), "cannot be combined"),
        (("--ollama-store",), "expected either models or --all"),
        (("--ollama-store", "/nowhere", "x"), "no models of Ollama at /nowhere"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], message: str) -> None:
    done = command("import", *arguments)
    assert done.code != 0
    assert message in done.err
