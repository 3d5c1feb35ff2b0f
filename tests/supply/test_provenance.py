"""`modelpack package --provenance`: what is recorded, attached, pushed and shown."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import modelpack
from modelpack import specfiles
from modelpack.artifacts.manifest import Manifest
from modelpack.errors import FormatError, UntrustedError, UsageError
from modelpack.operations import signatures as signing
from modelpack.operations.adapters import package_adapter
from modelpack.operations.convert import convert
from modelpack.operations.provenance import (
    ProvenanceOptions,
    found_source,
    read_provenance,
    recorded_provenance,
)
from modelpack.operations.referrers import AttachedFile, attach
from modelpack.operations.remote import RemoteOptions, open_repository
from modelpack.storage import read_blob, watching
from modelpack.testing import registry
from modelpack.trust.keys import PrivateKey
from modelpack.trust.policy import Trust
from modelpack.trust.provenance import SLSA_PROVENANCE, Provenance, Resource
from modelpack.trust.signatures import Signature, SignatureKind
from modelpack.trust.sigstore import BUNDLE, PAYLOAD_TYPE, Bundle, Statement, Subject
from tests.adapters import tiny_base, write_peft
from tests.cli.running import modelpack as command
from tests.cli.running import succeed
from tests.models import FIXTURES, tiny_gguf, tiny_safetensors
from tests.supply.conftest import PASSWORD

COMMIT = "e6239e69a715057c992fc343624d204ab2c1a4c1"
VALID: dict[str, Any] = {
    "buildDefinition": {
        "buildType": "https://build.example/v1",
        "externalParameters": {"a": 1},
        "internalParameters": {"b": [2]},
        "resolvedDependencies": [
            {"uri": "git+https://git.example/m", "digest": {"gitCommit": COMMIT}},
            {"name": "m.gguf", "digest": {"sha256": "00" * 32}},
            {"name": "note", "content": "aGk="},
        ],
    },
    "runDetails": {
        "builder": {"id": "urn:builder", "version": {"tool": "1"}, "builderDependencies": []},
        "metadata": {
            "invocationId": "7", "startedOn": "2025-01-02T03:04:05Z",
            "finishedOn": "2025-01-02T03:04:06Z",
        },
        "byproducts": [{"uri": "https://logs.example/7"}],
    },
    "unknown": True,
}  # fmt: skip


def changed(path: str, value: Any) -> dict[str, Any]:
    """Return the valid predicate with the field `path` set to `value`, or removed for `...`."""
    made = copy.deepcopy(VALID)
    *parents, last = path.split(".")
    place: Any = made
    for key in parents:
        place = place[int(key) if key.isdigit() else key]
    if value is ...:
        del place[last]
    else:
        place[int(last) if last.isdigit() else last] = value
    return made


DEFINITION, DETAILS, BUILDER = "buildDefinition", "runDetails", "runDetails.builder"
RESOURCES = f"{DEFINITION}.resolvedDependencies"


@pytest.mark.parametrize(
    "predicate",
    [
        VALID,
        changed(f"{DEFINITION}.externalParameters", {}),
        changed(f"{DEFINITION}.internalParameters", None),
        changed(f"{DEFINITION}.internalParameters", ...),
        changed(RESOURCES, None),
        changed(RESOURCES, []),
        changed(RESOURCES, ...),
        changed(f"{RESOURCES}.0.name", None),
        changed(f"{BUILDER}.version", None),
        changed(f"{DETAILS}.metadata", None),
        changed(f"{DETAILS}.metadata", {}),
        changed(f"{DETAILS}.metadata.startedOn", ""),
        changed(f"{DETAILS}.byproducts", ...),
    ],
)
def test_valid_predicates(predicate: dict[str, Any]) -> None:
    found = Provenance.parse(predicate, "p")
    assert (found.build_type, found.builder) == ("https://build.example/v1", "urn:builder")
    specfiles.validator("slsa-provenance").validate(predicate)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (DEFINITION, ...),
        (DEFINITION, []),
        (f"{DEFINITION}.buildType", ...),
        (f"{DEFINITION}.buildType", ""),
        (f"{DEFINITION}.buildType", "no URI"),
        (f"{DEFINITION}.buildType", "https://a b"),
        (f"{DEFINITION}.buildType", 5),
        (f"{DEFINITION}.externalParameters", ...),
        (f"{DEFINITION}.externalParameters", None),
        (f"{DEFINITION}.externalParameters", "x"),
        (f"{DEFINITION}.internalParameters", "x"),
        (RESOURCES, {"uri": "a:b"}),
        (RESOURCES, "x"),
        (f"{RESOURCES}.0", {}),
        (f"{RESOURCES}.0", {"name": "x"}),
        (f"{RESOURCES}.0", {"uri": "", "digest": {}}),
        (f"{RESOURCES}.0", "x"),
        (f"{RESOURCES}.0.digest", {"sha256": 5}),
        (f"{RESOURCES}.0.digest", "sha256"),
        (f"{RESOURCES}.0.uri", 5),
        (DETAILS, ...),
        (BUILDER, ...),
        (BUILDER, "x"),
        (f"{BUILDER}.id", ...),
        (f"{BUILDER}.id", None),
        (f"{BUILDER}.id", "builder"),
        (f"{BUILDER}.version", {"tool": 1}),
        (f"{BUILDER}.builderDependencies", [{}]),
        (f"{DETAILS}.metadata", "x"),
        (f"{DETAILS}.metadata.invocationId", 7),
        (f"{DETAILS}.metadata.finishedOn", "yesterday"),
        (f"{DETAILS}.metadata.startedOn", 5),
        (f"{DETAILS}.byproducts", [{"name": "log"}]),
    ],
)
def test_invalid_predicates(path: str, value: Any) -> None:
    predicate = changed(path, value)
    with pytest.raises(FormatError):
        Provenance.parse(predicate, "p")
    assert not specfiles.validator("slsa-provenance").is_valid(predicate)


def package(store: modelpack.Store, name: str = "team/m", **options: Any) -> Any:
    request = options.pop("request", None) or modelpack.PackageRequest(
        gguf=FIXTURES / "models/tiny-gguf/tiny.gguf"
    )
    how = ProvenanceOptions(**options)
    return modelpack.package(name, request, provenance=how, store=store)


def statement(store: modelpack.Store, made: Any) -> Statement:
    """Return the unsigned statement that was attached to a model; the schema accepts it."""
    [referrer] = store.referrers(made.digest, PAYLOAD_TYPE)
    [layer] = Manifest.parse(store.fetch_manifest(referrer)).layers
    found = Statement.parse(read_blob(store, layer), "statement")
    assert found.predicate_type == SLSA_PROVENANCE
    assert found.is_about(made.digest)
    specfiles.validator("slsa-provenance").validate(dict(found.predicate))
    return found


@pytest.fixture
def store(tmp_path: Path) -> modelpack.Store:
    return modelpack.Store(tmp_path / "store")


def test_what_is_recorded(store: modelpack.Store, tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("MIT\n")
    request = modelpack.PackageRequest(
        safetensors_dir=tiny_safetensors(tmp_path), licenses=(tmp_path / "LICENSE",),
        context_size=77, annotations={"k": "v"},
    )  # fmt: skip
    made = package(store, request=request)
    predicate = statement(store, made).predicate
    definition = predicate["buildDefinition"]
    assert definition["buildType"] == "urn:modelpack:package:v1"
    assert definition["externalParameters"] == {
        "safetensorsDir": True, "licenses": ["LICENSE"], "contextSize": 77,
        "annotations": {"k": "v"},
    }  # fmt: skip
    assert definition["resolvedDependencies"] == [
        {"name": layer.filepath, "digest": {"sha256": layer.digest.encoded}}
        for layer in made.manifest.layers
    ]
    assert predicate["runDetails"] == {
        "builder": {"id": "urn:modelpack:cli", "version": {"modelpack": modelpack.__version__}}
    }
    assert str(tmp_path) not in json.dumps(dict(predicate))  # the machine's paths are its own


def test_the_same_inputs_give_the_same_statement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        gguf = tiny_gguf(tmp_path / place)
        request = modelpack.PackageRequest(gguf=gguf)
        made.append(package(modelpack.Store(tmp_path / place / "store"), request=request))
    assert made[0].provenance == made[1].provenance
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1735787045")
    store = modelpack.Store(tmp_path / "timed")
    timed = statement(store, package(store)).predicate["runDetails"]["metadata"]
    assert timed == {"startedOn": "2025-01-02T03:04:05Z", "finishedOn": "2025-01-02T03:04:05Z"}


def git(directory: Path, *arguments: str) -> None:
    names = ("-c", "user.name=a", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", directory, *names, *arguments], check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A git work tree with a model."""
    directory = tmp_path / "tree"
    directory.mkdir()
    tiny_gguf(directory)
    (directory / "LICENSE").write_text("MIT\n")
    git(directory, "init", "-q")
    git(directory, "add", "-A")
    git(directory, "commit", "-qm", "A model")
    return directory


def commit_of(directory: Path) -> str:
    done = subprocess.run(
        ["git", "-C", directory, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("remote", "uri"),
    [
        ("", ""),
        ("https://git.example/team/m.git", "git+https://git.example/team/m.git"),
        ("https://user:secret@git.example/m", "git+https://git.example/m"),
        ("https://token@git.example/m", "git+https://git.example/m"),
        ("git@git.example:team/m.git", "git+ssh://git@git.example/team/m.git"),
        ("ssh://git@git.example:22/m", "git+ssh://git@git.example:22/m"),
        ("ssh://git:secret@git.example/m", "git+ssh://git.example/m"),
        ("/srv/private/m.git", ""),
        ("../m.git", ""),
    ],
)
def test_the_commit_of_a_work_tree(tree: Path, remote: str, uri: str) -> None:
    if remote:
        git(tree, "remote", "add", "origin", remote)
    found = found_source([tree / "tiny.gguf", tree / "LICENSE"])
    assert found == Resource("source", uri, {"gitCommit": commit_of(tree)})


def changes() -> list[Callable[[Path], object]]:
    return [
        lambda tree: (tree / "LICENSE").write_text("other\n"),
        lambda tree: git(tree, "rm", "-q", "--cached", "LICENSE"),
        lambda tree: (tree / ".git" / "HEAD").write_text("ref: refs/heads/none\n"),
        lambda tree: os.rename(tree / ".git", tree / "git"),
    ]


@pytest.mark.parametrize("change", changes())
def test_other_files_than_those_of_the_commit(tree: Path, change: Callable[[Path], object]) -> None:
    change(tree)
    assert found_source([tree / "tiny.gguf", tree / "LICENSE"]) is None


def test_without_git(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert found_source([tree / "tiny.gguf"]) is None


def test_a_snapshot_of_the_hub(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--team--tiny-m" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    blob = tmp_path / "models--team--tiny-m" / "blobs" / "x"
    blob.parent.mkdir()
    blob.write_bytes(tiny_gguf(tmp_path).read_bytes())
    (snapshot / "m.gguf").symlink_to(blob)
    expected = Resource("source", "https://huggingface.co/team/tiny-m", {"gitCommit": COMMIT})
    assert found_source([snapshot / "m.gguf"]) == expected
    assert found_source([snapshot / "m.gguf", tmp_path / "other.gguf"]) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"git+https://git.example/m@{COMMIT}",
         Resource("source", "git+https://git.example/m", {"gitCommit": COMMIT})),
        (f"git+ssh://git@git.example/m@{COMMIT}",
         Resource("source", "git+ssh://git@git.example/m", {"gitCommit": COMMIT})),
        ("https://data.example/m@v1", Resource("source", "https://data.example/m@v1")),
        ("", None),
        (COMMIT, None),
        ("team/m", None),
        ("https://a b", None),
        ("https://user:secret@git.example/m", None),
    ],
)  # fmt: skip
def test_a_named_source(text: str, expected: Resource | None) -> None:
    if expected is None:
        with pytest.raises(UsageError) as caught:
            Resource.named(text)
        assert "secret" not in str(caught.value)
    else:
        assert Resource.named(text) == expected


def test_the_model_that_it_starts_from(store: modelpack.Store) -> None:
    origin = {
        "org.opencontainers.image.source": "https://huggingface.co/team/m",
        "org.opencontainers.image.revision": COMMIT,
    }
    gguf = FIXTURES / "models/tiny-gguf/tiny.gguf"
    base = modelpack.package(
        "team/base", modelpack.PackageRequest(gguf=gguf, annotations=origin), store=store
    )
    made = modelpack.package(
        "team/m", modelpack.PackageRequest(context_size=5), from_model="team/base",
        provenance=ProvenanceOptions(), store=store,
    )  # fmt: skip
    definition = statement(store, made).predicate["buildDefinition"]
    uri = "oci://docker.io/team/base"
    assert definition["externalParameters"] == {
        "from": f"{uri}@{base.digest.encoded}", "contextSize": 5,
    }  # fmt: skip
    assert definition["resolvedDependencies"] == [
        {"name": "base", "uri": uri, "digest": {"sha256": base.digest.encoded}},
        {"name": "origin", "uri": "https://huggingface.co/team/m", "digest": {"gitCommit": COMMIT}},
    ]


def test_an_adapter(store: modelpack.Store, tmp_path: Path) -> None:
    request = modelpack.PackageRequest(safetensors_dir=tiny_base(tmp_path / "base"))
    base = modelpack.package("team/base", request, store=store)
    made = package_adapter(
        "team/lora", write_peft(tmp_path / "lora"), "team/base",
        provenance=ProvenanceOptions(), store=store,
    )  # fmt: skip
    definition = statement(store, made).predicate["buildDefinition"]
    first, *others = definition["resolvedDependencies"]
    digest = {"sha256": base.digest.encoded}
    assert first == {"name": "base", "uri": "oci://docker.io/team/base", "digest": digest}
    assert {one["name"] for one in others} == {layer.filepath for layer in made.manifest.layers}


def test_the_inputs_of_a_step_before(store: modelpack.Store, tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "a.safetensors").write_bytes(b"before")
    made = package(
        store, parameters={"quantize": "q4"}, tools={"mlx": "1"}, inputs=tmp_path / "before"
    )
    predicate = statement(store, made).predicate
    [one] = predicate["buildDefinition"]["resolvedDependencies"]
    assert one["name"] == "a.safetensors"
    assert predicate["buildDefinition"]["externalParameters"]["quantize"] == "q4"
    assert predicate["runDetails"]["builder"]["version"].keys() == {"modelpack", "mlx"}


def test_a_signed_statement(store: modelpack.Store, ours: PrivateKey, theirs: PrivateKey) -> None:
    made = package(store, key=ours)
    [referrer] = store.referrers(made.digest, BUNDLE)
    assert referrer.digest == made.provenance
    [layer] = Manifest.parse(store.fetch_manifest(referrer)).layers
    bundle = Bundle.parse(read_blob(store, layer), "bundle")
    assert bundle.envelope.is_signed_by(ours.public)
    assert not bundle.envelope.is_signed_by(theirs.public)
    [found] = recorded_provenance(store, made.digest)
    assert found.is_signed
    # The statement itself is the same without a signature.
    package(store)
    assert statement(store, made).encode() == bundle.statement.encode()


def test_what_is_not_provenance_is_left_out(store: modelpack.Store, tmp_path: Path) -> None:
    made, other = package(store), package(store, "team/other", request=modelpack.PackageRequest(
        gguf=FIXTURES / "models/tiny-gguf-aligned/tiny.gguf"
    ))  # fmt: skip
    file = tmp_path / "statement"
    said = statement(store, other)
    texts = [
        b"no JSON",
        b"[]",
        said.encode(),  # about another model
        Statement(said.subjects, "https://x.example/other", said.predicate).encode(),
        Statement(statement(store, made).subjects, SLSA_PROVENANCE, {"a": 1}).encode(),
    ]
    for text in texts:
        file.write_bytes(text)
        attach(
            "team/m", [AttachedFile(file, PAYLOAD_TYPE)], artifact_type=PAYLOAD_TYPE,
            annotations={"in-toto.io/predicate-type": SLSA_PROVENANCE}, store=store,
        )  # fmt: skip
    assert len(store.referrers(made.digest)) == 6
    assert [one.referrer.digest for one in recorded_provenance(store, made.digest)] == [
        made.provenance
    ]


def test_from_the_command_line(
    tmp_path: Path, tree: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COSIGN_PASSWORD", PASSWORD.decode())
    where = ("--store", tmp_path / "store")
    with registry(tmp_path / "registry") as server:
        name = f"{server.host}/team/m:v1"
        made = succeed(
            "package", name, "--gguf", tree / "tiny.gguf", "--provenance", "--key",
            keys / "ours.key", "--push", "--json", *where,
        )  # fmt: skip
        digest = made.json["provenance"]
        source = f"@{commit_of(tree)}"
        shown = succeed("inspect", name, *where).out
        assert f"Provenance:   modelpack {modelpack.__version__} from source{source}" in shown
        assert "(signed, not verified)" in shown
        value = succeed("inspect", name, "--json", *where).json["provenance"]
        assert [(one["referrer"], one["signed"]) for one in value] == [(digest, True)]
        assert value[0]["sources"] == [f"source{source}"]
        # It was pushed with the model.
        listed = succeed("referrers", name).out
        assert digest in listed
        assert SLSA_PROVENANCE in listed
        remote = json.loads(succeed("inspect", name, "-r", "--provenance").out)
        assert remote == value[0]["predicate"]
        assert read_provenance(name)[0].predicate == remote
    # A conversion is another model, of which nothing is recorded.
    stored = modelpack.Store(tmp_path / "store")
    convert(name, "team/cncf:v1", to="cncf", store=stored)
    refused = command("inspect", "team/cncf:v1", "--provenance", *where)
    assert refused.code != 0
    assert "the model has no provenance attached" in refused.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--key", "x.key"], "--key and --source require --provenance"),
        (["--source", "https://x.example"], "--key and --source require --provenance"),
        (["--provenance", "--dry-run"], "cannot be combined with --dry-run"),
        (["--provenance", "--source", "here"], "'here' is not a source"),
        (["--provenance", "--key", "none.key"], "none.key: cannot be read"),
    ],
)
def test_wrong_options(options: list[str], says: str, tmp_path: Path) -> None:
    gguf = FIXTURES / "models/tiny-gguf/tiny.gguf"
    done = command("package", "team/m", "--gguf", gguf, *options, "--store", tmp_path / "store")
    assert done.code != 0
    assert says in done.err
    assert not modelpack.Store(tmp_path / "store").models()


PLAIN = """
[publishers.team]
keys = ["ours.pub"]
[[rules]]
models = ["*"]
publishers = ["team"]
provenance = true
"""
GIT = "git+https://git.example/team/m"


def trusting(keys: Path, text: str) -> RemoteOptions:
    path = keys / "provenance.toml"
    path.write_text(text)
    return RemoteOptions(trust=Trust.of(policy=path))


@dataclass
class Maker:
    """Publishes models with and without signatures and provenance."""

    host: str
    store: modelpack.Store
    ours: PrivateKey

    def __call__(
        self, signed: bool = True, provenance: ProvenanceOptions | None = None, size: int = 1
    ) -> str:
        name = f"{self.host}/team/m:v1"
        gguf = FIXTURES / "models/tiny-gguf/tiny.gguf"
        request = modelpack.PackageRequest(gguf=gguf, context_size=size)
        modelpack.package(name, request, provenance=provenance, push=True, store=self.store)
        if signed:
            signing.sign(name, self.ours)
        return name


@pytest.fixture
def make(tmp_path: Path, ours: PrivateKey) -> Iterator[Maker]:
    with registry(tmp_path / "registry") as server:
        yield Maker(server.host, modelpack.Store(tmp_path / "origin"), ours)


def pulled(name: str, remote: RemoteOptions, root: Path) -> modelpack.Store:
    store = modelpack.Store(root / "pulled")
    modelpack.pull(name, store=store, remote=remote)
    return store


def test_a_policy_requires_provenance(
    make: Maker, keys: Path, ours: PrivateKey, tmp_path: Path
) -> None:
    remote = trusting(keys, PLAIN)
    name = make(provenance=ProvenanceOptions(ours))
    store = pulled(name, remote, tmp_path)
    # The provenance is stored with the model, which is checked at each use.
    [found] = recorded_provenance(store, store.resolve(name).digest)
    assert found.is_signed
    assert modelpack.resolve(name, store=store, remote=remote)
    assert verify_provenance(name, ours).kind is SignatureKind.PROVENANCE


def verify_provenance(name: str, key: PrivateKey) -> Signature:
    _, found = signing.verify(name, [key.public], formats=[SignatureKind.PROVENANCE])
    [signature] = found.signatures
    assert signature.provenance is not None
    assert signature.provenance.builder == "urn:modelpack:cli"
    return signature


@pytest.mark.sample(1)
@pytest.mark.parametrize("how", ["none", "unsigned", "theirs"])
def test_without_provenance_of_the_publisher(
    how: str, make: Maker, keys: Path, ours: PrivateKey, theirs: PrivateKey, tmp_path: Path
) -> None:
    options = {
        "none": None, "unsigned": ProvenanceOptions(), "theirs": ProvenanceOptions(theirs),
    }  # fmt: skip
    name = make(provenance=options[how])
    with pytest.raises(UntrustedError, match="has no provenance signed by team") as caught:
        pulled(name, trusting(keys, PLAIN), tmp_path)
    assert caught.value.hint is not None
    assert not list((tmp_path / "pulled" / "blobs").rglob("*/*"))  # nothing was fetched
    assert pulled(name, trusting(keys, PLAIN.replace("provenance = true", "")), tmp_path)
    with pytest.raises(UntrustedError):
        verify_provenance(name, ours)


def test_provenance_is_no_signature(
    make: Maker, keys: Path, ours: PrivateKey, tmp_path: Path
) -> None:
    name = make(signed=False, provenance=ProvenanceOptions(ours))
    for text in (PLAIN, PLAIN.replace("provenance = true", "")):
        with pytest.raises(UntrustedError, match="is not signed by team"):
            pulled(name, trusting(keys, text), tmp_path)
    with pytest.raises(UntrustedError):
        signing.verify(name, [ours.public])


def test_provenance_of_another_model_does_not_count(
    make: Maker, keys: Path, ours: PrivateKey, tmp_path: Path
) -> None:
    make(provenance=ProvenanceOptions(ours), size=7)
    [other] = recorded_provenance(make.store, make.store.resolve(f"{make.host}/team/m:v1").digest)
    statement_of_other = Statement(
        (Subject(make.store.resolve(f"{make.host}/team/m:v1").digest),),
        SLSA_PROVENANCE,
        other.predicate,
    )
    name = make()
    attached_to(name, statement_of_other, ours)
    with pytest.raises(UntrustedError, match=r"has no provenance signed by team: bundle \w+: is"):
        pulled(name, trusting(keys, PLAIN), tmp_path)


def test_a_predicate_that_is_not_provenance_does_not_count(
    make: Maker, keys: Path, ours: PrivateKey, tmp_path: Path
) -> None:
    name = make()
    digest = make.store.resolve(name).digest
    attached_to(name, Statement((Subject(digest),), SLSA_PROVENANCE, {"builder": "me"}), ours)
    attached_to(name, Statement((Subject(digest),), "https://x.example/v1", VALID), ours)
    with pytest.raises(UntrustedError, match="buildDefinition: is null, expected an object"):
        pulled(name, trusting(keys, PLAIN), tmp_path)
    # A statement of another builder counts: its signer vouches for it.
    attached_to(name, Statement((Subject(digest),), SLSA_PROVENANCE, VALID), ours)
    assert pulled(name, trusting(keys, PLAIN), tmp_path)


def attached_to(name: str, statement: Statement, key: PrivateKey) -> None:
    watch = watching(None)
    with open_repository(
        modelpack.Reference.parse(name), RemoteOptions(), watch, writes=True
    ) as at:
        subject = at.resolve(modelpack.Reference.parse(name).tag or "")
        signing.attach_statement(at, subject, statement, key, watch)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("source", "patterns", "accepted"),
    [
        (f"{GIT}@{COMMIT}", [f"{GIT}"], True),
        (f"{GIT}@{COMMIT}", ["git+https://git.example/team/*"], True),
        (f"{GIT}@{COMMIT}", ["git+https://git.example/other/*", "git+https://*/m"], True),
        (f"{GIT}@{COMMIT}", ["git+https://git.example/other/*"], False),
        (f"{GIT}@{COMMIT}", ["https://git.example/team/m"], False),
        (GIT, ["*"], False),  # an address without a commit
        (None, ["*"], False),  # the commit of this work tree, without an address
    ],
)
def test_a_policy_restricts_sources(
    source: str | None, patterns: list[str], accepted: bool, make: Maker, keys: Path,
    ours: PrivateKey, tmp_path: Path,
) -> None:  # fmt: skip
    named = Resource.named(source) if source is not None else None
    name = make(provenance=ProvenanceOptions(ours, named))
    remote = trusting(keys, PLAIN + f"sources = {json.dumps(patterns)}\n")
    if accepted:
        assert pulled(name, remote, tmp_path)
        return
    with pytest.raises(UntrustedError, match="has no provenance signed by team with commits of"):
        pulled(name, remote, tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (PLAIN.replace("true", "1"), "provenance: expected true or false"),
        (PLAIN.replace("true", "'slsa'"), "provenance: expected true or false"),
        (PLAIN.replace("true", "false") + "sources = ['x']", "sources requires provenance = true"),
        (PLAIN + "sources = []", "sources is not an array of at least one string"),
        (PLAIN + "sources = 'x'", "sources is not an array of at least one string"),
        (PLAIN + "source = ['x']", "unknown field 'source'"),
        (PLAIN + "formats = ['provenance']", "'provenance' is not a format of signatures"),
        (PLAIN.replace("publishers = [", "accept = true\n#"), "accept = true cannot be combined"),
    ],
)
def test_policies_that_are_wrong(text: str, says: str, keys: Path) -> None:
    with pytest.raises(FormatError) as caught:
        trusting(keys, text)
    assert says in str(caught.value)
