"""Manifests that mean one thing to one reader and another to the next: refused, nothing kept."""

from __future__ import annotations

import hashlib
import json
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

import modelpack
import modelpack.testing
from modelpack.artifacts import media_types
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.manifest import parse_manifest_or_index
from modelpack.errors import ManifestError, ModelpackError
from modelpack.storage import watching
from tests.registry.faulty import REPOSITORY, FaultyRegistry

DOCKER = "application/vnd.docker.ai"
CONFIG, GGUF = f"{DOCKER}.model.config.v0.1+json", f"{DOCKER}.gguf.v3"
WEIGHTS = b"weights"
Value = dict[str, Any]


@pytest.fixture
def registry() -> Iterator[FaultyRegistry]:
    with FaultyRegistry() as registry:
        yield registry


def described(registry: FaultyRegistry, content: bytes, media_type: str) -> Value:
    blob = registry.put_blob(content)
    return {"mediaType": media_type, "digest": str(blob.digest), "size": blob.size}


def sound(registry: FaultyRegistry) -> Value:
    """A manifest without a fault, its blobs in the registry."""
    weight = described(registry, WEIGHTS, GGUF)
    about = {
        "config": {"format": "gguf"},
        "descriptor": {},
        "rootfs": {"type": "rootfs", "diff_ids": [weight["digest"]]},
    }
    return {
        "schemaVersion": 2,
        "mediaType": media_types.OCI_MANIFEST,
        "config": described(registry, json.dumps(about).encode(), CONFIG),
        "layers": [weight],
    }


def layer(**changes: Any) -> Callable[[Value], None]:
    return lambda value: value["layers"][0].update(changes)


def second_layer(**changes: Any) -> Callable[[Value], None]:
    return lambda value: value["layers"].append(value["layers"][0] | changes)


def top(**changes: Any) -> Callable[[Value], None]:
    return lambda value: value.update(changes)


def sha512_of(content: bytes) -> str:
    return f"sha512:{hashlib.sha512(content).hexdigest()}"


HEX = hashlib.sha256(WEIGHTS).hexdigest()
CHANGES: dict[str, Callable[[Value], None]] = {
    "a layer too long": layer(size=len(WEIGHTS) + 1),
    "a layer too short": layer(size=len(WEIGHTS) - 1),
    "a size that is none": layer(size=-1),
    "a size as text": layer(size="7"),
    "a size with a fraction": layer(size=7.5),
    "a size that is true": layer(size=True),
    "two sizes of one layer": second_layer(size=len(WEIGHTS) + 1),
    "upper case": layer(digest=f"sha256:{HEX.upper()}"),
    "a short digest": layer(digest=f"sha256:{HEX[:-1]}"),
    "a long digest": layer(digest=f"sha256:{HEX}0"),
    "a line feed": layer(digest=f"sha256:{HEX}\n"),
    "md5": layer(digest="md5:" + "0" * 32),
    "another algorithm's name": layer(digest=f"sha512:{HEX}"),
    "a path": layer(digest="sha256:../../index.json"),
    "no digest": layer(digest=None),
    "sha512 of something else": layer(digest=sha512_of(b"others!")),
    "blake3 of something else": layer(digest=f"blake3:{HEX}"),
    "blake3 in upper case": layer(digest=f"BLAKE3:{HEX}"),
    "a manifest with manifests": top(manifests=[]),
    "a manifest that says it is an index": top(mediaType=media_types.OCI_INDEX),
    "a manifest of schema 1": top(schemaVersion=1),
    "layers that are no list": lambda value: value.update(layers=value["layers"][0]),
    "a layer that is null": lambda value: value["layers"].append(None),
    "no media type of a layer": layer(mediaType=None),
    "a media type with a line feed": layer(mediaType=f"{GGUF}\r\nX-Evil: 1"),
}


def pulled(registry: FaultyRegistry, raw: bytes, tmp_path: Path) -> tuple[modelpack.Store, str]:
    registry.put_manifest(raw, "v1")
    store = modelpack.Store(tmp_path / "store")
    reference = f"{registry.host}/{REPOSITORY}:v1"
    modelpack.pull(reference, store=store)
    return store, reference


def test_what_is_sound_is_taken(registry: FaultyRegistry, tmp_path: Path) -> None:
    store, reference = pulled(registry, json.dumps(sound(registry)).encode(), tmp_path)
    [file] = modelpack.resolve(reference, store=store).files
    assert file.path.read_bytes() == WEIGHTS


def test_layers_may_have_blake3_digests(
    registry: FaultyRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pulled, checked, kept and pushed like others; without the package nothing is stored."""
    digest = f"blake3:{blake3(WEIGHTS).hexdigest()}"
    registry.content.blobs[REPOSITORY, digest] = WEIGHTS
    value = sound(registry)
    layer(digest=digest)(value)
    raw = json.dumps(value).encode()
    store, reference = pulled(registry, raw, tmp_path)
    assert store.gc(grace_seconds=0).removed == ()
    [file] = modelpack.resolve(reference, store=store).files
    assert file.path.read_bytes() == WEIGHTS
    with modelpack.testing.registry() as other:
        modelpack.push(reference, to=f"{other.host}/team/m:v1", store=store)
        assert other.store.blob_path(Digest.parse(digest)).read_bytes() == WEIGHTS
    file.path.chmod(0o644)
    file.path.write_bytes(b"another")
    assert not store.fsck(watch=watching(None)).ok
    monkeypatch.setitem(sys.modules, "blake3", None)
    with pytest.raises(ModelpackError, match="the package blake3 is not installed"):
        pulled(registry, raw, tmp_path / "without")
    assert modelpack.Store(tmp_path / "without" / "store").models() == ()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_refused(registry: FaultyRegistry, tmp_path: Path, change: Callable[[Value], None]) -> None:
    value = sound(registry)
    change(value)
    with pytest.raises(ModelpackError):
        pulled(registry, json.dumps(value).encode(), tmp_path)
    assert modelpack.Store(tmp_path / "store").models() == ()


def with_key(key: bytes) -> Callable[[bytes], bytes]:
    return lambda raw: raw.replace(b'"schemaVersion"', key + b': [], "schemaVersion"')


SPELLED = {
    "a key twice": with_key(b'"layers"'),
    "a key in other case": with_key(b'"Layers"'),
    "a key with a long s": with_key('"layerſ"'.encode()),
    "something after it": lambda raw: raw + raw,
    "not a number": lambda raw: raw.replace(b'"schemaVersion": 2', b'"schemaVersion": NaN'),
    "another encoding": lambda raw: raw.decode().encode("utf-16"),
    "bytes that are no text": with_key(b'"\xff"'),
    "half a pair": with_key(b'"\\ud800"'),
    "a mark before it": lambda raw: b"\xef\xbb\xbf" + raw,
}  # fmt: skip


@pytest.mark.parametrize("spell", SPELLED.values(), ids=SPELLED)
def test_json_that_readers_disagree_about(
    registry: FaultyRegistry, tmp_path: Path, spell: Callable[[bytes], bytes]
) -> None:
    raw = spell(json.dumps(sound(registry)).encode())
    with pytest.raises(ModelpackError):
        pulled(registry, raw, tmp_path)
    assert modelpack.Store(tmp_path / "store").models() == ()


def test_a_config_that_is_a_layer_opens_nothing(registry: FaultyRegistry, tmp_path: Path) -> None:
    value = sound(registry)
    value["config"] |= {"digest": value["layers"][0]["digest"], "size": len(WEIGHTS)}
    store, reference = pulled(registry, json.dumps(value).encode(), tmp_path)
    with pytest.raises(ModelpackError):
        modelpack.resolve(reference, store=store)


@pytest.mark.parametrize("key", ["layers", "config"])
def test_an_index_that_is_a_manifest_too(key: str) -> None:
    value = {"schemaVersion": 2, "mediaType": media_types.OCI_INDEX, "manifests": [], key: []}
    with pytest.raises(ManifestError, match=f"has '{key}'"):
        parse_manifest_or_index(json.dumps(value).encode(), "it")


#: Made when the test runs, so that they do not stay in memory.
HUGE: dict[str, Callable[[], bytes]] = {
    "a config of 50 MB": lambda: b'{"config": {}, "x": "' + b" " * 50_000_000 + b'"}',
    "a config nested deeply": lambda: b'{"config": ' + b'{"a":' * 100_000,
    "a config of a large number": lambda: b'{"config": {"x": ' + b"9" * 100_000 + b"}}",
}


@pytest.mark.parametrize("content", HUGE.values(), ids=HUGE)
def test_a_config_that_costs_too_much(
    registry: FaultyRegistry, tmp_path: Path, content: Callable[[], bytes]
) -> None:
    value = sound(registry)
    value["config"] = described(registry, content(), CONFIG)
    registry.put_manifest(json.dumps(value).encode(), "v1")
    tracemalloc.start()
    try:
        with pytest.raises(ModelpackError):
            modelpack.inspect(f"{registry.host}/{REPOSITORY}:v1", from_registry=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20_000_000
