"""`modelpack catalog`: the listed models, the omitted tags, and a page that escapes all texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import pytest

import modelpack
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.reference import Reference
from modelpack.cli.main import run
from modelpack.errors import RegistryError, UsageError
from modelpack.operations.catalog import MAX_CARD_BYTES, CatalogEntry, catalog, page, write_catalog
from modelpack.operations.model_list import Summary
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.sbom import sbom
from modelpack.registry import Registry, RetryPolicy
from modelpack.testing import registry
from modelpack.trust.sbom import CYCLONEDX
from tests.models import FIXTURES, tiny_gguf, tiny_safetensors
from tests.operations.conftest import Records
from tests.peers import docker_registry
from tests.registry.faults import Exchange, answering, with_headers
from tests.registry.faulty import FaultyRegistry

PROJECTOR = FIXTURES / "models" / "tiny-mmproj" / "mmproj-tiny-f16.gguf"
ANNOTATIONS = {
    "org.opencontainers.image.title": "A <b>model</b>",
    "org.opencontainers.image.description": "<script>alert(1)</script> & more",
}


def fill(host: str, tmp_path: Path) -> modelpack.Store:
    """Three models in two namespaces, one of them under two tags."""
    store = modelpack.Store(tmp_path / "origin")
    tensors = modelpack.PackageRequest(
        safetensors_dir=tiny_safetensors(tmp_path), annotations=ANNOTATIONS
    )
    gguf = modelpack.PackageRequest(gguf=tiny_gguf(tmp_path))
    (tmp_path / "t.jinja").write_text("{% if tools %}{{ tools }}{% endif %}<think>{{ messages }}")
    tools = modelpack.PackageRequest(
        gguf=tiny_gguf(tmp_path), format="cncf", chat_template=tmp_path / "t.jinja"
    )
    for name, request in (
        ("team/a:v2", tensors), ("team/a:v1", tensors), ("team/deep/b:v1", gguf),
        ("teams/c:v1", tools),
    ):  # fmt: skip
        modelpack.package(f"{host}/{name}", request, push=True, store=store)
    sbom(f"{host}/team/a:v1", from_registry=True, attach=True)
    return store


@pytest.fixture(params=["embedded", "docker-registry"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The second registry keeps referrers under a tag, which is not a model."""
    if request.param == "embedded":
        with registry(tmp_path / "registry") as server:
            yield server.host
    else:
        with docker_registry(tmp_path / "registry") as running:
            yield running


def names(entries: tuple[CatalogEntry, ...]) -> list[str]:
    return [f"{one.reference.repository}:{one.reference.tag}" for one in entries]


@pytest.mark.sample(1)
def test_what_is_listed(host: str, tmp_path: Path) -> None:
    fill(host, tmp_path)
    entries = catalog(f"{host}/team")
    assert names(entries) == ["team/a:v1", "team/a:v2", "team/deep/b:v1"]
    assert names(catalog(host)) == [*names(entries), "teams/c:v1"]
    assert names(catalog(host, repositories=["teams/c", "no/such"])) == ["teams/c:v1"]
    assert catalog(f"{host}/none") == ()
    [fourth] = catalog(f"{host}/teams")
    assert fourth.to_json()["capabilities"] == ["tools", "reasoning"]
    assert "<dt>Capabilities</dt><dd>tools</dd><dd>reasoning</dd>" in page([fourth], "")
    first, second, third = entries
    assert third.capabilities == ()
    assert first.digest == second.digest
    assert (first.title, first.licences) == (
        ANNOTATIONS["org.opencontainers.image.title"],
        ("MIT",),
    )
    assert first.attached == (CYCLONEDX,)
    assert third.attached == third.licences == ()
    assert first.summary is not None
    assert third.summary is not None
    assert (first.summary.format, third.summary.format) == ("safetensors", "gguf")


@pytest.mark.parametrize(
    ("config", "listed"),
    [
        ({}, []),
        ({"vision_config": {}, "image_token_id": 5}, ["vision"]),
        ({"vision_config": {}, "audio_config": {}, "video_token_id": 5},
         ["vision", "audio", "video"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("format", ["docker", "cncf"])
def test_models_that_read_pictures_are_listed(
    format: Literal["docker", "cncf"], config: dict[str, Any], listed: list[str], tmp_path: Path
) -> None:
    """The catalogue and its page name what the fields of the model's config.json say it reads."""
    directory = tiny_safetensors(tmp_path)
    stored = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(stored | config))
    request = modelpack.PackageRequest(safetensors_dir=directory, format=format)
    with registry(tmp_path / "registry") as server:
        store = modelpack.Store(tmp_path / "origin")
        modelpack.package(f"{server.host}/team/a:v1", request, push=True, store=store)
        assert run(["catalog", f"{server.host}/team", "-o", str(tmp_path / "site")]) == 0
    [one] = json.loads((tmp_path / "site" / "index.json").read_text())["models"]
    assert one.get("capabilities", []) == listed
    html = (tmp_path / "site" / "index.html").read_text()
    terms = "".join(f"<dd>{name}</dd>" for name in listed)
    assert (f"<dt>Capabilities</dt>{terms}" in html) == bool(listed)


@pytest.mark.parametrize("format", ["docker", "cncf"])
def test_a_gguf_with_a_projector_reads_pictures(
    format: Literal["docker", "cncf"], tmp_path: Path
) -> None:
    request = modelpack.PackageRequest(gguf=tiny_gguf(tmp_path), mmproj=PROJECTOR, format=format)
    with registry(tmp_path / "registry") as server:
        store = modelpack.Store(tmp_path / "origin")
        modelpack.package(f"{server.host}/team/a:v1", request, push=True, store=store)
        [one] = catalog(f"{server.host}/team")
    assert one.capabilities == ("vision",)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (answering(200, b"no manifest"), "is not JSON"),
        (
            with_headers(Content_Type="application/vnd.docker.distribution.manifest.v1+json"),
            "served as",
        ),
        (with_headers(Docker_Content_Digest=str(Digest.of(b"other"))), "does not match"),
    ],
)
def test_what_cannot_be_read_keeps_nothing_else_out(
    tmp_path: Path, fault: Callable[[Exchange], None], said: str
) -> None:
    with FaultyRegistry() as server:
        request = modelpack.PackageRequest(gguf=tiny_gguf(tmp_path))
        for name in ("team/a:v1", "team/b:v1"):
            modelpack.package(f"{server.host}/{name}", request, push=True,
                              store=modelpack.Store(tmp_path / "origin"))  # fmt: skip
        server.content.tags["team/b", "no tag"] = "sha256:" + "0" * 64
        server.faults.add("GET", "/team/a/manifests/v1", fault, times=None)
        broken, sound = catalog(server.host, repositories=["team/a", "team/b"])
    assert names((broken, sound)) == ["team/a:v1", "team/b:v1"]
    assert said in broken.problem
    assert "digest" not in broken.to_json()
    assert "None" not in page([broken], "")
    assert (sound.problem, sound.summary is None) == ("", False)


def test_no_weights_are_fetched(tmp_path: Path) -> None:
    records = Records()
    with registry(tmp_path / "registry", on_request=records.add) as server:
        store = fill(server.host, tmp_path)
        weights = {
            str(file.descriptor.digest)
            for name in ("team/a:v1", "teams/c:v1")
            for file in modelpack.inspect(f"{server.host}/{name}", store=store).select(["weight"])
        }
        records.forget(server)
        catalog(server.host)
        fetched = {one.path.rpartition("/")[2] for one in records.settled(server)}
    assert fetched & weights == set()
    assert any(name.startswith("sha256:") for name in fetched)


def test_pages_of_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelpack.registry.repository._PAGE", 1)
    with registry(tmp_path / "registry") as server:
        fill(server.host, tmp_path)
        with Registry(server.host) as there:
            assert list(there.repositories()) == ["team/a", "team/deep/b", "teams/c"]


def test_a_registry_that_lists_nothing() -> None:
    with FaultyRegistry() as server, pytest.raises(RegistryError, match="does not list its"):
        catalog(server.host, remote=RemoteOptions(retry=RetryPolicy(tries=1)))


@pytest.mark.parametrize("name", ["team/x", "", "UPPER CASE/x", "registry.example/Bad Name"])
def test_names_that_are_no_registrys(name: str) -> None:
    with pytest.raises(UsageError):
        catalog(name)


class Reader(HTMLParser):
    """Collects the elements and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    return reader


def entry(**more: Any) -> CatalogEntry:
    reference = Reference.parse("registry.example/team/a:v1")
    return CatalogEntry(reference, Digest.of(b"x"), **more)


def test_a_page_holds_what_models_say_as_text() -> None:
    evil = "</td><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
    summary = Summary(5, "gguf", evil, evil, evil, 8192, None)
    fields = {"title": evil, "description": evil, "problem": evil, "card": evil}
    one = entry(summary=summary, licences=(evil,), attached=(evil,), **fields)
    reader = read(page([one], evil))
    kinds = [tag for tag, _ in reader.tags]
    assert kinds.count("script") == 1
    assert "img" not in kinds
    assert sum(evil in text for text in reader.texts) >= 7
    [policy] = [a["content"] for tag, a in reader.tags if a.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert not any("src" in attributes for _, attributes in reader.tags)


def test_a_model_card_is_on_the_page_unless_it_is_huge(tmp_path: Path) -> None:
    directory = tiny_safetensors(tmp_path)
    store = modelpack.Store(tmp_path / "origin")
    with registry(tmp_path / "registry") as server:
        for tag, text in (("card", "# It knows nothing"), ("huge", "x" * (MAX_CARD_BYTES + 1))):
            (directory / "README.md").write_text(text)
            request = modelpack.PackageRequest(safetensors_dir=directory)
            modelpack.package(f"{server.host}/a:{tag}", request, push=True, store=store)
        card, huge = catalog(server.host)
    assert (card.card, huge.card) == ("# It knows nothing", "")
    assert "card" not in card.to_json()
    assert "# It knows nothing" in read(page([card], "")).texts


def test_the_same_models_give_the_same_bytes(tmp_path: Path) -> None:
    entries = [entry(problem="is broken"), entry(variants=(Digest.of(b"y"),))]
    first = [p.read_bytes() for p in write_catalog(entries, tmp_path / "a", name="n")]
    assert [p.read_bytes() for p in write_catalog(entries, tmp_path / "b", name="n")] == first
    value = json.loads(first[1])
    assert [one.get("problem") for one in value["models"]] == ["is broken", None]
    assert value["models"][1]["variants"] == [str(Digest.of(b"y"))]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "site"
    with registry(tmp_path / "registry") as server:
        host = server.host
        fill(host, tmp_path)
        assert run(["catalog", f"{host}/team", "-o", str(output), "--title", "Ours"]) == 0
        assert capsys.readouterr().out.strip() == str(output / "index.html")
        assert run(["catalog", host]) == 0
        listed = capsys.readouterr().out.split()
    assert listed[0] == f"{host}/team/a:v1"
    assert len(listed) == 4
    value = json.loads((output / "index.json").read_text())
    assert [one["tag"] for one in value["models"]] == ["v1", "v2", "v1"]
    reader = read((output / "index.html").read_text())
    assert "Ours" in reader.texts
    assert ANNOTATIONS["org.opencontainers.image.description"] in reader.texts
    assert run(["catalog", "team/x", "-o", str(output)]) == 2
