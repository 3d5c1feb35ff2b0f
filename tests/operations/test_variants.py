"""Variants: choosing the manifest of an index, and creating, pushing and pulling indexes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import modelpack
from modelpack import errors
from modelpack.artifacts import media_types
from modelpack.artifacts.descriptor import Descriptor
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import Index, Manifest
from modelpack.operations import variants as machines
from modelpack.operations.index import NamedVariant, create_index
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.variants import GPU, Machine, choose_variant
from modelpack.testing import registry
from tests.cli.running import modelpack as command
from tests.cli.running import succeed
from tests.models import FIXTURES, store_of_two

GB = 10**9
MAC = Machine("darwin/arm64", "metal", 16 * GB)
CUDA = Machine("linux/amd64", "cuda", 80 * GB)
CPU = Machine("linux/amd64", "none", 16 * GB)


def entry(name: str, kind: str, size: float, platform: str | None = None) -> Descriptor:
    said = {
        media_types.VARIANT: name,
        media_types.VARIANT_FORMAT: kind,
        media_types.VARIANT_SIZE: str(int(size * GB)),
    }
    digest = Digest.of(f"{name}{kind}{size}".encode())
    return Descriptor(media_types.OCI_MANIFEST, digest, 500, said, platform=platform)


ALL = (
    entry("q4", "gguf", 4),
    entry("q8", "gguf", 8),
    entry("mlx", "mlx", 4.5),
    entry("full", "safetensors", 15),
)
BOUND = (entry("mac", "mlx", 4, "darwin/arm64"), entry("intel", "gguf", 4, "linux/amd64/v3"))


@pytest.mark.parametrize(
    ("entries", "machine", "expected"),
    [
        (ALL, MAC, "mlx"),
        (ALL, CPU, "q8"),
        (ALL, CUDA, "full"),
        (ALL, Machine("linux/amd64", "cuda", 16 * GB), "q8"),
        (ALL, Machine("linux/amd64", "none", 8 * GB), "q4"),
        (ALL, Machine("linux/amd64", "none", 2 * GB), "q4"),  # the smallest, with a note
        (ALL, Machine("linux/amd64"), "q8"),
        (ALL, Machine("darwin/arm64", "metal", 64 * GB, "llama.cpp"), "q8"),
        (ALL, Machine("linux/amd64", "cuda", 80 * GB, "vllm"), "full"),
        (ALL, Machine("linux/amd64", "none", 16 * GB, "mlx"), "q8"),
        (BOUND, MAC, "mac"),
        (BOUND, CPU, "intel"),
        ((*BOUND, entry("any", "safetensors", 1)), Machine("linux/arm64"), "any"),
        ((Descriptor(media_types.OCI_MANIFEST, Digest.of(b"x"), 5),), CPU, "1"),
    ],
)
def test_what_a_machine_takes(
    entries: tuple[Descriptor, ...], machine: Machine, expected: str
) -> None:
    chosen = choose_variant(Index.build(entries), "x", machine=machine)
    assert chosen.variant.name == expected
    assert ("may not fit" in chosen.why) == (machine.memory == 2 * GB)


@pytest.mark.parametrize(
    ("entries", "machine", "said"),
    [
        (BOUND, Machine("windows/amd64"), "on windows/amd64; available: mac (darwin/arm64), intel"),
        (
            ALL[:2],
            Machine("linux/amd64", backend="vllm"),
            "on linux/amd64 with vllm; available: q4",
        ),
        ((), CPU, "available: none"),
    ],
)
def test_nothing_to_take(entries: tuple[Descriptor, ...], machine: Machine, said: str) -> None:
    with pytest.raises(errors.UnsupportedError) as caught:
        choose_variant(Index.build(entries), "x", machine=machine)
    assert said in str(caught.value)


def test_a_name_wins_over_the_machine() -> None:
    chosen = choose_variant(Index.build(BOUND), "x", name="mac", machine=CPU)
    assert chosen.variant.name == "mac"
    with pytest.raises(errors.NotFoundError, match=r"no variant 'q2'; available: mac"):
        choose_variant(Index.build(BOUND), "x", name="q2")


@pytest.mark.parametrize(
    ("platform", "problem"),
    [
        ("linux", "expected an object"),
        ({"os": "linux"}, "needs 'os' and 'architecture'"),
        ({"os": 1, "architecture": "x"}, "needs 'os'"),
    ],
)
def test_platforms_that_are_none(platform: Any, problem: str) -> None:
    value = {"schemaVersion": 2, "mediaType": media_types.OCI_INDEX,
             "manifests": [ALL[0].to_json() | {"platform": platform}]}  # fmt: skip
    with pytest.raises(errors.ManifestError) as caught:
        Index.parse(json.dumps(value).encode())
    assert problem in str(caught.value)
    assert "manifests[0].platform" in str(caught.value)


@pytest.mark.parametrize(
    ("system", "processor", "nvidia", "expected"),
    [
        ("darwin", "arm64", False, ("darwin/arm64", "metal")),
        ("darwin", "x86_64", False, ("darwin/amd64", "none")),
        ("linux", "x86_64", True, ("linux/amd64", "cuda")),
        ("linux", "aarch64", False, ("linux/arm64", "none")),
    ],
)
def test_machines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, system: str, processor: str, nvidia: bool,
    expected: tuple[str, GPU],
) -> None:  # fmt: skip
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("platform.machine", lambda: processor)
    driver = tmp_path / "version"
    if nvidia:
        driver.touch()
    monkeypatch.setattr(machines, "_NVIDIA", driver)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = Machine.here()
    assert (found.platform, found.gpu) == expected
    assert (found.memory is None) == nvidia  # no nvidia-smi on this PATH
    assert nvidia or (found.room or 0) > 0


@pytest.mark.parametrize(("says", "expected"), [("81559\n81559\n", 81559 * 2**20), ("", None)])
def test_memory_of_a_gpu(says: str, expected: int | None) -> None:
    def run(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0, says, "")

    assert machines._nvidia_memory(run) == expected


@pytest.fixture
def models(tmp_path: Path) -> modelpack.Store:
    """A store with a GGUF model and a directory of safetensors."""
    return store_of_two(tmp_path)


VARIANTS = (NamedVariant("gguf", "x/gguf:v1"), NamedVariant("st", "x/st:v1", "darwin/arm64"))


def test_an_index_of_stored_models(
    models: modelpack.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = create_index("x/all:v1", VARIANTS, store=models)
    assert create_index("x/all:v2", VARIANTS, store=models).digest == made.digest
    names = ("x/gguf:v1", "x/st:v1")
    gguf, safetensors = (modelpack.inspect(name, store=models) for name in names)
    assert [m.digest for m in made.index.manifests] == [gguf.digest, safetensors.digest]
    assert made.index.manifests[1].platform == "darwin/arm64"
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, backend=None: CPU))
    assert modelpack.inspect("x/all:v1", store=models).digest == gguf.digest
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, backend=None: MAC))
    assert modelpack.inspect("x/all:v1", store=models).digest == safetensors.digest
    chosen = modelpack.resolve("x/all:v1", store=models, remote=RemoteOptions(variant="gguf"))
    assert chosen.model.digest == gguf.digest
    monkeypatch.undo()
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls, backend=None: CPU))
    # Only the index references the blobs of the models, and fsck follows it.
    for name in names:
        models.remove(name)
    assert models.gc(grace_seconds=0)
    assert modelpack.inspect("x/all:v1", store=models).digest == gguf.digest
    listed = json.loads(succeed("list", "--json", "--store", models.root).stdout)["models"]
    assert {tag for model in listed for tag in model["tags"]} == {
        "docker.io/x/all:v1", "docker.io/x/all:v2"
    }  # fmt: skip
    assert {model["format"] for model in listed} == {"gguf"}  # the variant for this machine


def test_one_tag_for_every_machine(models: modelpack.Store, tmp_path: Path) -> None:
    create_index("x/all:v1", VARIANTS, store=models)
    with registry() as server:
        name = f"{server.host}/x/all:v1"
        modelpack.push("x/all:v1", to=name, store=models)
        here = modelpack.Store(tmp_path / "here")
        gguf = modelpack.inspect("x/gguf:v1", store=models).digest
        st = modelpack.inspect("x/st:v1", store=models).digest
        assert modelpack.pull(name, store=here).digest == gguf
        assert str(here.models()[0].references[0]) == name
        taken = modelpack.resolve(name, pull=True, store=here, remote=RemoteOptions(variant="st"))
        assert taken.model.digest == st
        assert here.resolve(name).digest == st
        seen = modelpack.inspect(name, from_registry=True, remote=RemoteOptions(variant="gguf"))
        assert seen.digest == gguf
        # Other clients request a manifest by digest, and get a single model.
        plain = modelpack.pull(f"{name.rpartition(':')[0]}@{st}", store=here)
        assert plain.digest == st
        # A copy has all variants.
        copied = modelpack.copy(name, f"{server.host}/y/all:v2")
        assert copied.digest == models.resolve("x/all:v1").digest
        result = succeed("index", "show", name, "-r", "--json").json
        assert [variant["name"] for variant in result["variants"]] == ["gguf", "st"]
        assert result["chosen"] == "gguf"
        parted = succeed("pull", name, "--variant", "st", "--store", tmp_path / "cli")
        assert parted.out == str(st)
        assert "the variant st, as requested" in parted.err


def test_an_index_is_pushed_without_storing(tmp_path: Path, models: modelpack.Store) -> None:
    with registry() as server:
        modelpack.push("x/gguf:v1", to=f"{server.host}/a/gguf:v1", store=models)
        modelpack.push("x/st:v1", to=f"{server.host}/b/st:v1", store=models)
        result = succeed(
            "index", "create", f"{server.host}/c/all:v1", "--push", "--store", tmp_path / "empty",
            "--variant", f"gguf={server.host}/a/gguf:v1", "--variant", f"st={server.host}/b/st:v1",
            "--platform", "st=darwin/arm64", "--json",
        ).json  # fmt: skip
        assert not modelpack.Store(tmp_path / "empty").models()
        assert result["digest"] == str(create_index("z/z:1", VARIANTS, store=models).digest)
        other = modelpack.Store(tmp_path / "other")
        modelpack.pull(f"{server.host}/c/all:v1", store=other)


def test_an_index_of_one_quantised_model_says_mlx(tmp_path: Path) -> None:
    directory = tmp_path / "m"
    directory.mkdir()
    source = FIXTURES / "models/tiny-safetensors/model.safetensors"
    (directory / "model.safetensors").write_bytes(source.read_bytes())
    config = {"quantization": {"bits": 4, "group_size": 64}}
    (directory / "config.json").write_text(json.dumps(config))
    store = modelpack.Store(tmp_path / "store")
    modelpack.package("x/q", modelpack.PackageRequest(safetensors_dir=directory), store=store)
    made = create_index("x/all", [NamedVariant("a", "x/q")], store=store)
    assert made.index.manifests[0].annotations[media_types.VARIANT_FORMAT] == "mlx"
    assert made.index.manifests[0].annotations[media_types.VARIANT_QUANTIZATION] == "4bit"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "Missing option '--variant'"),
        (("--variant", "gguf"), 2, "--variant 'gguf': expected NAME=REF"),
        (("--variant", "=x/gguf:v1"), 2, "expected NAME=REF"),
        (("--variant", "a=x/gguf:v1", "--variant", "a=x/st:v1"), 2, "same name"),
        (("--variant", "a b=x/gguf:v1"), 2, "'a b' is not a tag"),
        (("--variant", "a=x/none:v1"), 3, "x/none:v1"),
        (("--variant", "a=x/gguf:v1", "--platform", "b=linux/amd64"), 2, "no such --variant"),
        (("--variant", "a=x/gguf:v1", "--platform", "a=linux"), 1, "'linux' is not a platform"),
    ],
)
def test_wrong_indexes(
    models: modelpack.Store, arguments: tuple[str, ...], code: int, said: str
) -> None:
    result = command("index", "create", "x/all:v1", *arguments, "--store", models.root)
    assert result.code == code
    assert said in result.err
    assert len(models.models()) == 2


def test_a_model_without_variants_has_none(models: modelpack.Store) -> None:
    with pytest.raises(errors.UnsupportedError, match="is a single model, not an index"):
        modelpack.resolve("x/gguf:v1", store=models, remote=RemoteOptions(variant="mlx"))
    result = command("index", "show", "x/gguf:v1", "--store", models.root)
    assert "is a single model" in result.err
    wrong = command("index", "create", "x/a@sha256:" + "0" * 64, "--variant", "a=x/gguf:v1",
                    "--store", models.root)  # fmt: skip
    assert "a digest cannot be chosen" in wrong.err


def test_an_index_within_an_index_is_no_variant(models: modelpack.Store) -> None:
    create_index("x/all:v1", VARIANTS, store=models)
    made = create_index("x/of-all:v1", [NamedVariant("a", "x/all:v1")], store=models)
    [manifest] = made.index.manifests
    assert Manifest.parse(models.fetch_manifest(manifest))
