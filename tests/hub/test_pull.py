"""Models of the hub: pulled, copied, resumed, verified, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import modelpack
from modelpack import errors
from modelpack.artifacts import media_types
from modelpack.operations.pull import Part, Selection, find_model
from modelpack.storage import watching
from modelpack.testing import registry
from tests.cli.running import modelpack as command
from tests.cli.running import succeed
from tests.hub.conftest import QUICK, fixture, gguf, padded_gguf
from tests.hub.hub import TOKEN, FakeHub
from tests.registry.faults import (
    Exchange,
    answering,
    cut_after,
    flipped_bit,
    ignoring_range,
    redirecting,
    replaced,
    shortened,
)

NAME = "Org/Tiny"
BIG = 3_000_000


@pytest.fixture
def tiny(hub: FakeHub) -> str:
    """The commit of the sharded safetensors model, with its weights in storage."""
    files = fixture("tiny-safetensors-sharded")
    hub.large = {path for path in files if path.endswith(".safetensors")}
    return hub.put(NAME, files | {".gitattributes": b"x", "README.md": b"# Tiny\n"})


def pulled(store: modelpack.Store, name: str = f"hf.co/{NAME}") -> modelpack.Model:
    done = modelpack.pull(name, store=store, remote=QUICK)
    return modelpack.inspect(str(done.digest), store=store)


def test_a_model_is_all_its_files_verified_and_pinned(
    hub: FakeHub, tiny: str, store: modelpack.Store
) -> None:
    model = pulled(store)
    contents = {
        file.filepath: store.blob_path(file.descriptor.digest).read_bytes()
        for file in model.files()
    }
    expected = fixture("tiny-safetensors-sharded") | {"README.md": b"# Tiny\n"}
    assert contents == expected
    assert list(contents) == sorted(expected)  # flat: the order of a walk
    assert model.config.format == "safetensors"
    assert model.manifest.annotations == {
        media_types.SOURCE: "https://huggingface.co/Org/Tiny",
        media_types.REVISION: tiny,
    }
    assert [str(r) for m in store.models() for r in m.references] == [
        "huggingface.co/org/tiny:latest"
    ]
    # All pages of the listing were asked for, and small files came from the hub itself.
    assert hub.count("GET", "/tree/") == 3
    assert hub.count("GET", "/resolve/.*/config.json") == 1
    assert not hub.storage.seen("GET", "config.json")


def test_what_package_makes_of_the_same_files_differs_in_annotations_only(
    hub: FakeHub, tiny: str, store: modelpack.Store, tmp_path: Path
) -> None:
    model = pulled(store)
    directory = tmp_path / "snapshot"
    for file in model.files():
        path = directory / (file.filepath or "")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.blob_path(file.descriptor.digest).read_bytes())
    request = modelpack.PackageRequest(
        safetensors_dir=directory, annotations=model.manifest.annotations
    )
    assert modelpack.package("x/y", request, dry_run=True, store=store).digest == model.digest


def test_a_commit_has_one_digest_by_every_way(
    hub: FakeHub, tiny: str, store: modelpack.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = modelpack.pull(f"hf.co/{NAME}", store=store, remote=QUICK).digest
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    other = modelpack.Store(tmp_path / "other")
    pinned = modelpack.pull(f"hf.co/{NAME}@{tiny}", to="my/tiny:v1", store=other, remote=QUICK)
    assert pinned.digest == here
    assert str(pinned.reference) == "docker.io/my/tiny:v1"
    with registry() as server:
        copied = modelpack.copy(f"hf.co/{NAME}", f"{server.host}/a/b:c", target_options=QUICK)
        assert copied.digest == here
        back = modelpack.pull(f"{server.host}/a/b:c", store=modelpack.Store(tmp_path / "third"))
        assert back.digest == here


def test_a_copy_keeps_nothing_here(
    hub: FakeHub, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELPACK_STORE", str(tmp_path / "unused"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with registry() as server:
        result = succeed("copy", f"hf.co/{NAME}", f"{server.host}/a/b:c", "--json").json
        assert result["source"] == f"hf.co/{NAME}"
        assert result["blobsWritten"] == 8
    assert not (tmp_path / "unused").exists()
    assert not list(tmp_path.glob("modelpack-hub-*"))


def test_a_quantisation_comes_with_its_projector_and_papers(
    hub: FakeHub, store: modelpack.Store
) -> None:
    files = {f"m-{label}.gguf": padded_gguf(at * 400) for at, label in
             enumerate(("Q4_K", "Q4_K_M", "Q8_0"))}  # fmt: skip
    files |= {"mmproj-m-f16.gguf": fixture("tiny-mmproj")["mmproj-tiny-f16.gguf"]}
    hub.put(NAME, files | {"LICENSE": b"MIT\n", "README.md": b"# m\n"})
    model = pulled(store, f"hf.co/{NAME}:Q4_K")
    assert [file.filepath for file in model.files()] == [
        "LICENSE", "README.md", "m-Q4_K.gguf", "mmproj-m-f16.gguf"
    ]  # fmt: skip
    projector = model.select(["mmproj"])[0]
    assert projector.media_type == media_types.DOCKER_MMPROJ
    assert [f.filepath for f in model.select(["gguf"])] == ["m-Q4_K.gguf"]
    assert hub.count("GET", "Q8_0") == 0
    assert str(store.models()[0].references[0]) == "huggingface.co/org/tiny:Q4_K"


@pytest.mark.parametrize("name", ["tiny-gguf-sharded", "tiny-dduf", "tiny-gguf"])
def test_other_formats(hub: FakeHub, store: modelpack.Store, name: str) -> None:
    files = fixture(name)
    hub.large = set(files)
    hub.put(NAME, files)
    model = pulled(store)
    assert {f.filepath for f in model.files()} == set(files)
    assert model.config.media_type == media_types.DOCKER_CONFIG_V01
    modelpack.bundle(str(model.digest), store.root.parent / "bundle", store=store)


def test_storage_never_sees_the_token(
    hub: FakeHub, tiny: str, store: modelpack.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.private[NAME] = "private"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pulled(store)
    assert {r.headers["authorization"] for r in hub.requests} == {f"Bearer {TOKEN}"}
    assert hub.storage.requests
    assert not any("authorization" in r.headers for r in hub.storage.requests)


def test_the_token_of_a_login_is_used(
    hub: FakeHub, tiny: str, store: modelpack.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(path))
    hub.private[NAME] = "private"
    pulled(store)


def test_a_token_that_cannot_be_read(
    hub: FakeHub, store: modelpack.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after HF_OIDC_RESOURCE outside of a CI that huggingface_hub knows."""

    def fail() -> None:
        raise RuntimeError("no OIDC id token is available")

    monkeypatch.setattr("huggingface_hub.get_token", fail)
    with pytest.raises(
        errors.AuthError, match="cannot read the token of the hub: no OIDC id token is available"
    ):
        pulled(store)
    assert not hub.requests


@pytest.mark.parametrize(
    ("why", "token", "name", "kind", "said", "hint"),
    [
        (
            "gated",
            None,
            NAME,
            errors.AuthError,
            "401 GatedRepo: Access to model",
            "accept the terms of the gated model",
        ),
        (
            "gated",
            TOKEN,
            NAME,
            errors.DeniedError,
            "403 GatedRepo: Access to model",
            "accept the terms of the gated model",
        ),
        ("private", None, NAME, errors.AuthError, "401 RepoNotFound: Invalid user", "HF_TOKEN"),
        ("private", "hf_other", NAME, errors.AuthError, "401 RepoNotFound", "HF_TOKEN"),
        ("", None, "Org/None", errors.AuthError, "401 RepoNotFound", "may look the same"),
        ("", TOKEN, "Org/None", errors.NotFoundError, "404 RepoNotFound: Repository not", None),
        ("", None, f"{NAME}@v9", errors.NotFoundError, "404 RevisionNotFound: Invalid rev", "bran"),
    ],
)
def test_refusals_say_what_to_do(
    hub: FakeHub, tiny: str, store: modelpack.Store, monkeypatch: pytest.MonkeyPatch,
    why: str, token: str | None, name: str, kind: type[errors.ModelpackError], said: str,
    hint: str | None,
) -> None:  # fmt: skip
    hub.private[NAME] = why
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(kind) as caught:
        pulled(store, f"hf.co/{name}")
    assert said in str(caught.value)
    assert (hint or "") in (caught.value.hint or "")
    assert not store.models()
    assert "hf_" not in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize("path", ["/revision/", "/tree/", "/resolve/"])
def test_a_hub_leads_into_no_private_network(
    hub: FakeHub, tiny: str, store: modelpack.Store, path: str
) -> None:
    hub.faults.add("GET", path, redirecting("http://169.254.169.254/latest/"), times=None)
    with pytest.raises(errors.RegistryError, match="refused to connect"):
        pulled(store)


def test_limits_and_faults_are_waited_out(hub: FakeHub, tiny: str, store: modelpack.Store) -> None:
    hub.faults.add("GET", "/revision/", answering(429, Retry_After="1"), times=2)
    hub.faults.add("GET", "/tree/", answering(503), times=1)
    hub.faults.add("GET", "/resolve/.*LICENSE", cut_after(2), times=1)
    hub.faults.add("GET", "/resolve/.*/model-00001", answering(500), times=1)
    pulled(store)


def test_a_limit_that_stays_is_an_error(hub: FakeHub, tiny: str, store: modelpack.Store) -> None:
    hub.faults.add("GET", "/revision/", answering(429), times=99)
    with pytest.raises(errors.RemoteUnavailableError, match="429"):
        pulled(store)


def test_a_cut_download_goes_on_where_it_stopped(hub: FakeHub, store: modelpack.Store) -> None:
    content = padded_gguf(BIG)
    hub.put(NAME, {"m.gguf": content})
    cut = cut_after(100_000)

    def cut_the_first(exchange: Exchange) -> None:
        if "range" in exchange.headers:  # of a header, or of the rest
            exchange.send(exchange.reply())
        else:
            cut(exchange)

    hub.storage.faults.add("GET", "", cut_the_first, times=99)
    model = pulled(store)
    assert store.blob_path(model.files()[0].descriptor.digest).read_bytes() == content
    starts = [r.headers.get("range") for r in hub.storage.seen("GET")]
    assert starts[-2:] == [None, "bytes=100000-"]


def test_an_interrupted_pull_is_resumed_by_the_next(hub: FakeHub, store: modelpack.Store) -> None:
    content = padded_gguf(BIG)
    hub.put(NAME, {"m.gguf": content})
    stop = modelpack.Stop()

    def interrupt(progress: modelpack.Progress) -> None:
        if progress.name == "m.gguf" and progress.completed:
            stop.request()

    with pytest.raises(errors.InterruptedTransferError):
        modelpack.pull(f"hf.co/{NAME}", store=store, remote=QUICK, progress=interrupt, stop=stop)
    hub.storage.requests.clear()
    model = pulled(store)
    assert store.blob_path(model.files()[0].descriptor.digest).read_bytes() == content
    sent = sum(r.sent_size for r in hub.storage.requests)
    assert sent < BIG


@pytest.mark.parametrize("fault", [flipped_bit(200), shortened(4), replaced(b"<html>login</html>")])
def test_wrong_bytes_from_storage_are_refused(
    hub: FakeHub, store: modelpack.Store, fault: object
) -> None:
    hub.large = {"m.gguf"}
    hub.put(NAME, {"m.gguf": gguf()})
    hub.storage.faults.add("GET", "", fault, times=99)  # type: ignore[arg-type]
    with pytest.raises(errors.ModelpackError) as caught:
        pulled(store)
    assert isinstance(
        caught.value, errors.IntegrityError | errors.RegistryError | errors.WeightFormatError
    )
    assert not store.models()


@pytest.mark.parametrize("fault", [flipped_bit(0), shortened(1), replaced(b"<html>login</html>")])
def test_wrong_bytes_from_the_hub_are_refused(
    hub: FakeHub, tiny: str, store: modelpack.Store, fault: object
) -> None:
    hub.faults.add("GET", "/resolve/.*/config.json", fault, times=99)  # type: ignore[arg-type]
    with pytest.raises(errors.IntegrityError, match=r"config\.json of hf\.co/Org/Tiny"):
        pulled(store)
    assert not store.models()


def test_storage_without_ranges_will_do(hub: FakeHub, store: modelpack.Store) -> None:
    hub.put(NAME, {"m.gguf": padded_gguf(BIG)})
    hub.storage.faults.add("GET", "", ignoring_range, times=99)
    pulled(store)


@pytest.mark.parametrize(
    ("path", "answer", "said"),
    [
        ("/revision/", b"<html>", "the hub's response is not a JSON object"),
        ("/revision/", b'{"sha": "main"}', "the hub returned no commit for 'main'"),
        ("/tree/", b"{}", "the hub's response is not a JSON array"),
        ("/tree/", b'[{"type": "file"}]', "an entry without a path"),
        ("/tree/", b'[{"type":"file","path":"../x","size":1,"oid":"%s"}]' % (b"0" * 40), "unsafe"),
        ("/tree/", b'[{"type":"file","path":"x","size":-1,"oid":"%s"}]' % (b"0" * 40), "no size"),
        ("/tree/", b'[{"type":"file","path":"x","size":1,"oid":"x"}]', "no object id"),
        (
            "/tree/",
            b'[{"type":"file","path":"x","size":1,"oid":"%s","lfs":{"oid":"y","size":1}}]'
            % (b"0" * 40),
            "'x': 'sha256:y' is not a digest",
        ),
        (
            "/tree/",
            json.dumps(
                [
                    {"type": "file", "path": path, "size": 2, "oid": "0" * 40}
                    for path in ("a.safetensors", "a.json/b/c.json", "a.jsonl", "a.json")
                ]
            ).encode(),
            "'a.json' is a file and a directory",
        ),
    ],
)
def test_answers_that_make_no_sense(
    hub: FakeHub, tiny: str, store: modelpack.Store, path: str, answer: bytes, said: str
) -> None:
    hub.faults.add("GET", path, answering(200, answer), times=9)
    with pytest.raises(errors.ModelpackError) as caught:
        pulled(store)
    assert said in str(caught.value)


def test_pages_of_another_host_are_not_asked(
    hub: FakeHub, tiny: str, store: modelpack.Store
) -> None:
    link = f'<{hub.storage.url}/api/models/x/tree/y>; rel="next"'
    hub.faults.add("GET", "/tree/", answering(200, b"[]", Link=link), times=1)
    with pytest.raises(errors.RegistryError, match="on another host"):
        pulled(store)
    assert not hub.storage.requests


def test_offline_nothing_is_asked(
    hub: FakeHub, tiny: str, store: modelpack.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled(store)
    asked = len(hub.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    find_model(f"hf.co/{NAME}", store, pull=True, remote=QUICK, watch=watching(None))
    with pytest.raises(errors.RemoteUnavailableError, match="HF_HUB_OFFLINE forbids"):
        pulled(store, f"hf.co/{NAME}@v2")
    assert len(hub.requests) == asked


@pytest.mark.parametrize("endpoint", ["ftp://mirror.example", "mirror.example", "https://u@h/x"])
def test_an_endpoint_that_is_none(
    hub: FakeHub, store: modelpack.Store, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(errors.UsageError, match="HF_ENDPOINT"):
        pulled(store)


def test_a_token_does_not_go_over_plain_http(
    hub: FakeHub, store: modelpack.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(errors.AuthError, match=r"is not sent to mirror\.example over plain http"):
        pulled(store)


def test_parts_are_completed_from_the_same_commit(
    hub: FakeHub, tiny: str, store: modelpack.Store
) -> None:
    done = modelpack.pull(
        f"hf.co/{NAME}", selection=Selection(only=Part.CONFIG), store=store, remote=QUICK
    )
    assert len(done.missing) == 4
    hub.put(NAME, {"model.safetensors": fixture("tiny-safetensors")["model.safetensors"]})
    model = find_model(f"hf.co/{NAME}", store, pull=True, remote=QUICK, watch=watching(None))
    assert model.digest == done.digest
    assert not store.missing(model.descriptor)
    assert hub.count("GET", "/revision/") == 1  # no revision was resolved again


def test_a_branch_that_moved_is_pulled_anew(
    hub: FakeHub, tiny: str, store: modelpack.Store
) -> None:
    first = pulled(store)
    hub.put(NAME, {"model.safetensors": fixture("tiny-safetensors")["model.safetensors"]})
    second = pulled(store)
    assert second.digest != first.digest
    assert store.resolve("hf.co/org/tiny").digest == second.digest
    assert pulled(store, f"hf.co/{NAME}@{tiny}").digest == first.digest


def test_pickles_alone_are_refused(hub: FakeHub, store: modelpack.Store) -> None:
    hub.put(NAME, {"pytorch_model.bin": b"\x80\x04", "config.json": b"{}"})
    with pytest.raises(errors.PackagingError, match="Python pickles only"):
        pulled(store)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"m.gguf": b"GGUF but not really"}, "hf.co/Org/Tiny"),
        ({"model-00001-of-00002.safetensors": fixture("tiny-safetensors")["model.safetensors"]},
         "missing model-00002-of-00002.safetensors"),
        ({"model.safetensors": b"<!doctype html>"}, "is an HTML page"),
    ],
)  # fmt: skip
def test_weights_that_are_broken_on_the_hub(
    hub: FakeHub, store: modelpack.Store, files: dict[str, bytes], said: str
) -> None:
    hub.put(NAME, files)
    with pytest.raises(errors.ModelpackError) as caught:
        pulled(store)
    assert said in str(caught.value)
    assert "modelpack-hub-" not in str(caught.value)


def test_headers_are_read_by_ranges(hub: FakeHub, store: modelpack.Store) -> None:
    hub.put(NAME, {"m.gguf": padded_gguf(BIG)})
    model = modelpack.inspect(f"hf.co/{NAME}", from_registry=True, remote=QUICK)
    assert model.manifest.total_size > BIG
    assert sum(r.sent_size for r in hub.storage.requests) < BIG / 10


def test_import_and_pull_on_the_command_line(hub: FakeHub, tiny: str, tmp_path: Path) -> None:
    root = tmp_path / "store"
    one = succeed("import", f"hf.co/{NAME}", "my/tiny:v1", "--store", root)
    assert "pulled hf.co/Org/Tiny as docker.io/my/tiny:v1" in one.err
    two = succeed("pull", f"hf.co/{NAME}@{tiny}", "--store", root, "--json").json
    assert two["reference"] == f"huggingface.co/org/tiny:{tiny}"
    assert two["digest"] == one.out
    shown = json.loads(succeed("list", "--store", root, "--json").stdout)
    assert len(json.dumps(shown)) > 0
    resolved = succeed("resolve", f"hf.co/{NAME}@{tiny}", "--store", root).out
    assert len(resolved.splitlines()) == 2


def test_a_policy_keeps_unsigned_models_of_the_hub_out(
    hub: FakeHub, tiny: str, store: modelpack.Store, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('default = "reject"\n')
    for verb in ("import", "pull"):
        result = command(verb, f"hf.co/{NAME}", "--policy", policy, "--store", store.root)
        assert result.code == 5, result.err
    assert store.models() == ()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "expected SOURCE [REFERENCE]"),
        (
            ("a/b",),
            "'a/b' is not an archive, a model of the Hugging Face Hub or objects in a bucket",
        ),
        (("hf.co/a",), "expected ORG/NAME"),
        (("hf.co/a/b", "c", "d"), "expected SOURCE [REFERENCE]"),
        (("hf.co/a/b", "--all"), "require --docker-store"),
        (("hf.co/a/b", "x@sha256:" + "0" * 64), "a digest cannot be chosen"),
    ],
)
def test_wrong_imports(hub: FakeHub, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    hub.put("a/b", {"m.gguf": gguf()})
    result = command("import", *arguments, "--store", tmp_path / "store")
    assert result.code == 2
    assert said in result.err


@pytest.mark.parametrize("verb", ["lock", "pull"])
def test_the_hub_has_no_digests(hub: FakeHub, tmp_path: Path, verb: str) -> None:
    name = "hf.co/a/b" + ("" if verb == "lock" else "@sha256:" + "0" * 64)
    options = ["--lock-file", str(tmp_path / "lock")] if verb == "lock" else []
    result = command(verb, name, *options, "--store", tmp_path / "store")
    assert result.code == 1
    assert "Hugging Face Hub" in result.err
