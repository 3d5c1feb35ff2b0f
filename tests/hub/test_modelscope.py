"""Models of ModelScope: named, pulled and copied as those of the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import modelpack
from modelpack.artifacts import media_types
from modelpack.artifacts.digest import Digest
from modelpack.errors import (
    AuthError,
    DeniedError,
    DigestMismatchError,
    InvalidReferenceError,
    ModelpackError,
    NotFoundError,
    RegistryError,
    UnsafePathError,
    UnsupportedError,
    UsageError,
)
from modelpack.hub import modelscope as modelscope_module
from modelpack.hub.reference import HubReference
from modelpack.operations.pull import Part, Selection
from modelpack.testing import registry
from tests.cli.running import succeed
from tests.hub.conftest import QUICK, fixture, gguf, padded_gguf
from tests.hub.modelscope import TOKEN, FakeModelScope
from tests.registry.faults import answering

NAME = "modelscope.cn/Qwen/Tiny"
LOCAL = "modelscope.cn/qwen/tiny:latest"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeModelScope]:
    with FakeModelScope() as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # of the other hub alone
        yield hub


def test_a_model_is_pulled_and_copied_with_one_digest(
    hub: FakeModelScope, store: modelpack.Store
) -> None:
    commit = hub.put("Qwen/Tiny", fixture("tiny-safetensors") | {"big.json": b" " * 5000})
    done = modelpack.pull(NAME, store=store, remote=QUICK)
    assert str(done.reference) == LOCAL
    model = modelpack.inspect(NAME, store=store)
    assert model.manifest.annotations[media_types.SOURCE] == (
        "https://modelscope.cn/models/Qwen/Tiny"
    )
    assert model.manifest.annotations[media_types.REVISION] == commit
    assert {request.query["Revision"][0] for request in hub.requests} == {"master", commit}
    with registry() as server:
        copied = modelpack.copy(NAME, f"{server.host}/x/m:v1")
    assert copied.digest == done.digest
    assert succeed("resolve", NAME, "--store", store.root).out
    requests = len(hub.requests)
    assert modelpack.resolve(f"{NAME}", store=store, pull=True).model.digest == done.digest
    assert len(hub.requests) == requests


def test_a_partial_pull_is_completed_from_its_commit(
    hub: FakeModelScope, store: modelpack.Store
) -> None:
    hub.put("Qwen/Tiny", fixture("tiny-safetensors"))
    first = modelpack.pull(NAME, store=store, remote=QUICK, selection=Selection(only=Part.CONFIG))
    assert first.missing
    hub.put("Qwen/Tiny", {"model.gguf": gguf()})
    whole = modelpack.resolve(NAME, pull=True, store=store, remote=QUICK)
    assert whole.model.digest == first.digest
    assert store.missing(whole.model.descriptor) == ()


def test_quantisations_and_revisions(hub: FakeModelScope, store: modelpack.Store) -> None:
    files = {f"m-{kind}.gguf": padded_gguf(4000) + kind.encode() for kind in ("Q4_K_M", "Q8_0")}
    hub.put("Qwen/Tiny", files, revision="v1.0")
    done = modelpack.pull(f"{NAME}:Q8_0@v1.0", store=store, remote=QUICK)
    assert str(done.reference) == "modelscope.cn/qwen/tiny:Q8_0-v1.0"
    [weight] = modelpack.resolve(str(done.reference), store=store).files
    assert weight.path.read_bytes() == files["m-Q8_0.gguf"]
    with pytest.raises(NotFoundError, match="no GGUF has the quantisation Q2_K") as raised:
        modelpack.pull(f"{NAME}:Q2_K@v1.0", store=store, remote=QUICK)
    assert raised.value.hint == "write modelscope.cn/Qwen/Tiny:QUANT"


def test_without_a_commit_the_revision_stays(hub: FakeModelScope, store: modelpack.Store) -> None:
    hub.short_id = False
    hub.put("Qwen/Tiny", {"m.gguf": gguf()})
    modelpack.pull(NAME, store=store, remote=QUICK)
    model = modelpack.inspect(NAME, store=store)
    assert model.manifest.annotations[media_types.REVISION] == "master"


def test_the_token_stays_with_the_hub(
    hub: FakeModelScope, store: modelpack.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.is_private = True
    hub.put("Qwen/Tiny", {"m.gguf": padded_gguf(4000)})
    with pytest.raises(DeniedError, match=r"403"):
        modelpack.pull(NAME, store=store, remote=QUICK)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    modelpack.pull(NAME, store=store, remote=QUICK)
    assert all("authorization" not in one.headers for one in hub.storage.requests)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://mirror.example")
    with pytest.raises(AuthError, match=r"not sent to mirror\.example over plain http") as raised:
        modelpack.pull(NAME, store=store, remote=QUICK)
    assert TOKEN not in str(raised.value)
    assert "MODELSCOPE_ENDPOINT" in (raised.value.hint or "")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "not an address")
    with pytest.raises(UsageError, match="MODELSCOPE_ENDPOINT"):
        modelpack.pull(NAME, store=store, remote=QUICK)


def test_other_bytes_than_listed(hub: FakeModelScope, store: modelpack.Store) -> None:
    hub.put("Qwen/Tiny", {"m.gguf": padded_gguf(4000)})
    hub.entries["m.gguf"] = {"Sha256": "0" * 64}
    with pytest.raises(DigestMismatchError):
        modelpack.pull(NAME, store=store, remote=QUICK)
    assert store.models() == ()


@pytest.mark.parametrize(
    ("entry", "kind", "message"),
    [
        ({"Path": "../m.gguf"}, UnsafePathError, r"leaves the directory"),
        ({"Path": 1}, RegistryError, "an entry without a path"),
        ({"Size": -1}, RegistryError, "'m.gguf' has no size"),
        ({"Size": "1"}, RegistryError, "'m.gguf' has no size"),
        ({"Sha256": "abc"}, RegistryError, "'m.gguf': .*abc"),
        ({"Sha256": ""}, RegistryError, "states no SHA-256"),
    ],
)
def test_entries_that_are_wrong(
    hub: FakeModelScope,
    store: modelpack.Store,
    entry: dict[str, Any],
    kind: type[ModelpackError],
    message: str,
) -> None:
    hub.put("Qwen/Tiny", {"m.gguf": gguf()})
    hub.entries["m.gguf"] = entry
    with pytest.raises(kind, match=message):
        modelpack.pull(NAME, store=store, remote=QUICK)


def test_what_is_not_there(
    hub: FakeModelScope, store: modelpack.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("Qwen/Tiny", {"m.gguf": gguf()})
    with pytest.raises(NotFoundError, match="404"):
        modelpack.pull("modelscope.cn/Qwen/Absent", store=store, remote=QUICK)
    with pytest.raises(NotFoundError, match="no such revision: 'v9'"):
        modelpack.pull(f"{NAME}@v9", store=store, remote=QUICK)
    other = f"{NAME}@{'0' * 40}"
    hub.revisions["Qwen/Tiny", "0" * 40] = hub.revisions["Qwen/Tiny", "master"]
    with pytest.raises(RegistryError, match="returned another commit"):
        modelpack.pull(other, store=store, remote=QUICK)
    monkeypatch.setattr(modelscope_module, "MAX_ENTRIES", 1)
    with pytest.raises(UnsupportedError, match="the list is cut"):
        modelpack.pull(NAME, store=store, remote=QUICK)
    with pytest.raises(UnsupportedError, match="no digests"):
        modelpack.pull(f"modelscope.cn/qwen/tiny@{Digest.of(b'')}", store=store, remote=QUICK)


@pytest.mark.parametrize(
    "answer",
    [b"[]", b"<html>", json.dumps({"Success": False, "Message": "busy"}).encode(), b'{"Data": 1}'],
)
def test_answers_of_something_else(
    hub: FakeModelScope, store: modelpack.Store, answer: bytes
) -> None:
    hub.faults.add("GET", "/api/v1/models/Qwen/Tiny/repo/files", answering(200, answer))
    with pytest.raises(RegistryError, match=r"the files of modelscope\.cn/Qwen/Tiny"):
        modelpack.pull(NAME, store=store, remote=QUICK)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("modelscope.cn/Qwen/Tiny", NAME),
        ("modelscope://Qwen/Tiny:Q8_0", f"{NAME}:Q8_0"),
        ("www.modelscope.cn/Qwen/Tiny:master", NAME),
        ("https://modelscope.cn/models/Qwen/Tiny/summary", NAME),
        ("https://www.modelscope.cn/models/Qwen/Tiny/files@v1", None),
        ("https://modelscope.cn/models/Qwen/Tiny/tree/v1", f"{NAME}@v1"),
    ],
)
def test_names(text: str, shown: str | None) -> None:
    if shown is None:
        with pytest.raises(InvalidReferenceError, match="ORG/NAME"):
            HubReference.parse(text)
        return
    found = HubReference.parse(text)
    assert found is not None
    assert str(found) == shown
    assert replace(found, revision="master", quantization=None) == HubReference.parse(NAME)
