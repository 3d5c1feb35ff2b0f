"""Trust: policy files, and their effect on pull, resolve and lock."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import modelpack
from modelpack.artifacts.digest import Digest
from modelpack.errors import FormatError, ModelpackError, RegistryError, UntrustedError
from modelpack.operations import signatures as signing
from modelpack.operations.index import NamedVariant, create_index
from modelpack.operations.lock import lock, pull_locked
from modelpack.operations.pull import find_model
from modelpack.operations.remote import RemoteOptions
from modelpack.operations.trust import check_names
from modelpack.registry import RetryPolicy
from modelpack.storage import watching
from modelpack.trust.keys import PrivateKey
from modelpack.trust.policy import Trust, read_policy
from modelpack.trust.signatures import MANIFEST_FORMATS, SignatureKind
from tests.supply.conftest import Published

POLICY = """
[publishers.team]
keys = ["ours.pub"]
[publishers.others]
keys = ["theirs.pub"]
[[rules]]
models = ["*/team/*"]
publishers = ["team"]
[[rules]]
models = ["*/both/*"]
publishers = ["team", "others"]
threshold = 2
[[rules]]
models = ["localhost*"]
accept = true
"""


def trusting(keys: Path, text: str) -> Trust:
    path = keys / "policy.toml"
    path.write_text(text)
    trust = Trust.of(policy=path)
    assert trust is not None
    return trust


def test_the_first_rule_counts(keys: Path) -> None:
    trust = trusting(keys, POLICY)
    [rule] = trust.rules("registry.example/team/m")
    assert [one.name for one in rule.publishers] == ["team"]
    [rule] = trust.rules("localhost:5000/any")
    assert rule.threshold == 0
    with pytest.raises(UntrustedError, match=r"registry.example/x/m: no rule of the policy"):
        trust.rules("registry.example/x/m")


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("*", "registry.example/m"),
        ("localhost*", "localhost:5000/m"),
        ("localhost/*", "localhost/m"),
        ("registry.example:5000/team/?odel", "registry.example:5000/team/model"),
        ("*.example/*", "registry.example/a/b"),
        ("[a-r]*.example/m", "registry.example/m"),
        ("[[]::1]:5000/*", "[::1]:5000/team/m"),
        ("docker.io/ai/smollm2", "docker.io/ai/smollm2"),
    ],
)
def test_patterns_that_name_models(keys: Path, pattern: str, name: str) -> None:
    trust = trusting(keys, POLICY.replace("*/team/*", pattern))
    assert modelpack.Reference.parse(name).name == name
    [rule] = trust.rules(name)
    assert [one.name for one in rule.publishers] == ["team"]


@pytest.mark.parametrize(
    "pattern",
    [
        "registry.example//team/*",
        "registry.example/team//m",
        "registry.example/team/",
        "registry.example/team/* ",
        "registry.example/t\N{LATIN SMALL LETTER E WITH DIAERESIS}am/*",
        "registry.example/team/[m",
    ],
)
def test_patterns_that_match_no_repository(keys: Path, pattern: str) -> None:
    with pytest.raises(FormatError, match="matches no model"):
        trusting(keys, POLICY.replace("*/team/*", pattern))


def test_both_the_key_and_the_policy_count(keys: Path, theirs: PrivateKey) -> None:
    path = keys / "both.toml"
    path.write_text('default = "accept"')
    trust = Trust.of([theirs.public], path)
    assert trust is not None
    assert [rule.threshold for rule in trust.rules("any/where")] == [1, 0]
    assert Trust.of() is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rules = 1", "not an array of tables"),
        ("[[rules]]\nmodels = []\naccept = true", "models is not an array of at least one string"),
        ("[[rules]]\nmodels = 'x'\naccept = true", "models is not an array"),
        ("[[rules]]\nmodels = ['x']", "publishers is not an array"),
        ("[[rules]]\nmodels = ['x']\npublishers = ['who']", "no such publisher: 'who'"),
        ("[[rules]]\nmodels = ['x']\naccept = 1", "accept: expected true or false"),
        ("[[rules]]\nmodel = ['x']", "unknown field 'model'"),
        ("[[rule]]\nmodels = ['x']", "unknown field 'rule'"),
        ("default = 'allow'", 'default is \'allow\', expected "accept" or "reject"'),
        ("publishers = 3", "publishers: is not a table"),
        ("[publishers.a]\nkeys = ['none.pub']", "none.pub: cannot be read"),
        ("[publishers.a]\nkeys = ['-----BEGIN PUBLIC KEY-----']", "not a public key"),
        ("[publishers.a]\nkeys = ['ours.key']", "is a private key"),
        ("default = ", "is not TOML"),
        (POLICY + "publishers = ['team']", "accept = true cannot be combined with publishers"),
        (
            POLICY + "formats = ['cosign']",
            "accept = true cannot be combined with publishers, threshold or formats",
        ),
        (POLICY.replace("threshold = 2", "formats = ['pgp']"), "'pgp' is not a format"),
        (POLICY.replace("threshold = 2", "formats = 'cosign'"), "formats is not an array"),
        (POLICY.replace("threshold = 2", "threshold = 3"), "threshold is 3, expected 1 to 2"),
        (POLICY.replace("threshold = 2", "threshold = 0"), "threshold is 0, expected 1 to 2"),
        (POLICY.replace("threshold = 2", "threshold = true"), "threshold is True"),
        (
            POLICY.replace('"theirs.pub"', '"theirs.pub", "ours.pub"'),
            "two of the publishers share a key",
        ),
        (POLICY.replace("*/team", "Registry.example/team"), "names are in lower case"),
        (POLICY.replace("*/team/*", "registry.example/team/m:v1"), "without tag and digest"),
        (POLICY.replace("*/team/*", "registry.example/team/m@sha256:*"), "without tag and digest"),
        (POLICY.replace("*/team/*", "hf.co/team/*"), "begin with huggingface.co/"),
        (POLICY.replace("*/team/*", "index.docker.io/team/*"), "begin with docker.io/"),
        (POLICY.replace("*/team/*", "team/model"), "begin with docker.io/"),
        (
            POLICY.replace("*/team/*", "model"),
            "'model' matches no model: write registry/repository",
        ),
        (POLICY.replace("*/team/*", "[::1]:5000/*"), "write [[]::1]:5000/*"),
        (POLICY.replace("*/team/*", "x_y/team/*"), "begin with docker.io/"),
    ],
)
def test_policies_that_are_wrong(keys: Path, text: str, says: str) -> None:
    path = keys / "wrong.toml"
    path.write_text(text)
    with pytest.raises(FormatError) as raised:
        read_policy(path)
    assert says in str(raised.value)


def _options(trust: Trust) -> RemoteOptions:
    return RemoteOptions(trust=trust, retry=RetryPolicy(tries=1))


@pytest.mark.parametrize("kind", MANIFEST_FORMATS)
def test_a_pull_takes_what_is_signed(
    published: Published, keys: Path, ours: PrivateKey, kind: SignatureKind
) -> None:
    remote = _options(trusting(keys, POLICY))
    with pytest.raises(UntrustedError, match="is not signed by team: it has no signatures"):
        modelpack.pull(published.reference, store=published.store, remote=remote)
    assert published.store.models() == ()
    signing.sign(published.reference, ours, kinds=[kind])
    modelpack.pull(published.reference, store=published.store, remote=remote)
    # A stored model is accepted for the same reason.
    found = modelpack.resolve(published.reference, store=published.store, remote=remote)
    assert found.model.digest == published.digest


def test_nothing_of_a_refused_model_is_fetched(published: Published, keys: Path) -> None:
    with pytest.raises(UntrustedError):
        modelpack.pull(
            published.reference, store=published.store, remote=_options(trusting(keys, POLICY))
        )
    blobs = published.store.root / "blobs"
    assert [path for path in blobs.rglob("*") if path.is_file()] == []


def test_a_threshold(
    published: Published, keys: Path, ours: PrivateKey, theirs: PrivateKey
) -> None:
    reference = published.reference.replace("/team/", "/both/")
    modelpack.copy(published.reference, reference)
    remote = _options(trusting(keys, POLICY))
    signing.sign(reference, ours)
    with pytest.raises(UntrustedError, match="not signed by 2 of team or others"):
        modelpack.pull(reference, store=published.store, remote=remote)
    signing.sign(reference, theirs)
    modelpack.pull(reference, store=published.store, remote=remote)


def test_what_is_stored_is_checked_too(published: Published, keys: Path, ours: PrivateKey) -> None:
    """A model that was pulled before the policy existed."""
    remote, watch = _options(trusting(keys, POLICY)), watching(None)
    modelpack.pull(published.reference, store=published.store)
    store = published.store
    for name in (published.reference, str(published.digest)):
        with pytest.raises(UntrustedError, match="not signed by team"):
            find_model(name, store, pull=False, remote=remote, watch=watch)
        find_model(name, store, pull=False, remote=RemoteOptions(), watch=watch)
    store.tag(published.reference, modelpack.Reference.parse("localhost:1/any/name:v1"))
    find_model("localhost:1/any/name:v1", store, pull=False, remote=remote, watch=watch)
    # By digest, it needs trust under every name, and one registry is not reachable.
    with pytest.raises(RegistryError):
        find_model(str(published.digest), store, pull=False, remote=remote, watch=watch)
    signing.sign(published.reference, ours, kinds=[SignatureKind.BUNDLE], store=store)
    find_model(published.reference, store, pull=False, remote=remote, watch=watch)


def test_the_first_digits_of_an_id_are_no_name(
    published: Published, keys: Path, ours: PrivateKey
) -> None:
    """Their names look like those of docker.io models, which a rule may accept."""
    accepted = POLICY.replace('"localhost*"', '"docker.io/*"')
    remote, watch = _options(trusting(keys, accepted)), watching(None)
    store, encoded = published.store, published.digest.encoded
    modelpack.pull(published.reference, store=store)
    for name in (encoded[:4], encoded[:11], encoded[:13], f"sha256:{encoded[:20]}"):
        with pytest.raises(UntrustedError, match="not signed by team"):
            find_model(name, store, pull=False, remote=remote, watch=watch)
        with pytest.raises(UntrustedError, match="not signed by team"):
            check_names(store, [name], remote, watch)
        assert modelpack.inspect(name, store=store).reference is None
    # A model with such a name is found.
    named = modelpack.Reference.parse(encoded[:13])
    store.tag(published.reference, named)
    assert (
        find_model(encoded[:13], store, pull=False, remote=remote, watch=watch).reference == named
    )


@pytest.mark.parametrize("algorithm", ["sha512", "blake3"])
def test_a_digest_of_another_algorithm_is_no_name(
    published: Published, keys: Path, algorithm: str
) -> None:
    """It would be that of a docker.io model, too: docker.io/ai/sha512 with a long tag."""
    accepted = POLICY.replace('"localhost*"', '"docker.io/*"')
    remote, watch = _options(trusting(keys, accepted)), watching(None)
    store = published.store
    modelpack.pull(published.reference, store=store)
    found = store.resolve(published.reference)
    raw = store.fetch_manifest(found)
    same = replace(found, digest=Digest.of(raw, algorithm))
    store.write_manifest(same, raw, f"{published.host}/team/same:v1")
    for name in (str(same.digest), str(same.digest)[:30]):
        assert modelpack.inspect(name, store=store).reference is None
        with pytest.raises(UntrustedError, match="not signed by team"):
            find_model(name, store, pull=False, remote=remote, watch=watch)
        with pytest.raises(UntrustedError, match="not signed by team"):
            check_names(store, [name], remote, watch)


def test_a_variant_that_an_index_alone_names(
    published: Published, keys: Path, ours: PrivateKey
) -> None:
    """A server loads the model by its digest and must find the matching rule."""
    store, index = published.origin, f"{published.host}/team/index:v1"
    create_index(index, [NamedVariant("one", published.reference)], store=store)
    store.remove(published.reference)
    remote, watch = _options(trusting(keys, POLICY)), watching(None)
    for name in (index, str(published.digest)):
        with pytest.raises(UntrustedError, match="not signed by team"):
            find_model(name, store, pull=False, remote=remote, watch=watch)
    signing.sign(index, ours, store=store)
    for name in (index, str(published.digest)):
        found = find_model(name, store, pull=False, remote=remote, watch=watch)
        assert found.digest == published.digest


def test_a_registry_that_is_gone_is_no_reason_to_trust(
    published: Published, keys: Path, ours: PrivateKey
) -> None:
    store, watch = published.store, watching(None)
    modelpack.pull(published.reference, store=store)
    gone = modelpack.Reference.parse("127.0.0.1:1/team/model:v1")
    store.tag(published.reference, gone)
    remote = _options(trusting(keys, POLICY))
    with pytest.raises(RegistryError):
        find_model(str(gone), store, pull=False, remote=remote, watch=watch)
    # If the store has the signature, no registry is contacted.
    signing.sign(gone, ours, store=store)
    find_model(str(gone), store, pull=False, remote=remote, watch=watch)


def test_locked_models_are_checked(
    published: Published, keys: Path, ours: PrivateKey, tmp_path: Path
) -> None:
    path, store = tmp_path / "models.lock", published.store
    lock([published.reference], path=path)
    remote = _options(trusting(keys, POLICY))
    with pytest.raises(UntrustedError):
        pull_locked(path=path, store=store, remote=remote)
    pull_locked(path=path, store=store)
    with pytest.raises(UntrustedError):  # already stored, and still not signed
        pull_locked(path=path, store=store, remote=remote)
    signing.sign(published.reference, ours)
    pull_locked(path=path, store=store, remote=remote)


def test_locked_variants_are_checked(
    published: Published, keys: Path, ours: PrivateKey, tmp_path: Path
) -> None:
    """A lock pins the index; the store has the selected variant."""
    path, store, index = tmp_path / "models.lock", published.store, f"{published.host}/team/all:v1"
    create_index(
        index, [NamedVariant("one", published.reference)], push=True, store=published.origin
    )
    lock([index], path=path)
    remote = _options(trusting(keys, POLICY))
    with pytest.raises(UntrustedError):
        pull_locked(path=path, store=store, remote=remote)
    signing.sign(index, ours)
    pull_locked(path=path, store=store, remote=remote)
    assert store.resolve(index).digest == published.digest


def test_a_flood_of_bundles_is_refused(
    published: Published, keys: Path, ours: PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelpack.trust.signatures.MAX_SIGNATURES", 2)
    for _ in range(3):  # ECDSA signatures are never equal
        signing.sign(published.reference, ours, kinds=[SignatureKind.BUNDLE])
    with pytest.raises(ModelpackError, match="has 3 attached bundles"):
        signing.verify(published.reference, [replace(ours.public, name="ours")])
