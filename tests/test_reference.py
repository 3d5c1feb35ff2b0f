"""The table of spec/references.md, and properties of references."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack.artifacts.digest import Digest
from modelpack.artifacts.reference import (
    Reference,
    is_full_or_invalid,
    is_model_id,
    normalized,
    parse_full,
)
from modelpack.errors import InvalidReferenceError

H64 = "0123456789abcdef" * 4
ERROR = None

# input, normalised, parsed after normalising, parsed strictly
TABLE = [
    ("gemma3", "ai/gemma3:latest", "docker.io/ai/gemma3:latest", "docker.io/ai/gemma3:latest"),
    ("gemma3:v1", "ai/gemma3:v1", "docker.io/ai/gemma3:v1", "docker.io/ai/gemma3:v1"),
    ("MyModel", "ai/mymodel:latest", "docker.io/ai/mymodel:latest", ERROR),
    ("Gemma3:Q4_K_M", "ai/gemma3:Q4_K_M", "docker.io/ai/gemma3:Q4_K_M", ERROR),
    (
        "myorg/model",
        "myorg/model:latest",
        "docker.io/myorg/model:latest",
        "docker.io/myorg/model:latest",
    ),
    ("MyOrg/Model:V2", "myorg/model:V2", "docker.io/myorg/model:V2", ERROR),
    (
        "ai/gemma3:latest",
        "ai/gemma3:latest",
        "docker.io/ai/gemma3:latest",
        "docker.io/ai/gemma3:latest",
    ),
    ("  gemma3  ", "ai/gemma3:latest", "docker.io/ai/gemma3:latest", ERROR),
    ("gemma3:", "ai/gemma3:latest", "docker.io/ai/gemma3:latest", ERROR),
    ("abc123", "ai/abc123:latest", "docker.io/ai/abc123:latest", "docker.io/ai/abc123:latest"),
    (
        "1234567890ab",
        "1234567890ab",
        "docker.io/ai/1234567890ab:latest",
        "docker.io/ai/1234567890ab:latest",
    ),
    (H64, H64, ERROR, ERROR),
    (
        f"sha256:{H64}",
        f"sha256:{H64}",
        f"docker.io/ai/sha256:{H64}",
        f"docker.io/ai/sha256:{H64}",
    ),
    (
        "docker.io/gemma3",
        "docker.io/gemma3:latest",
        "docker.io/ai/gemma3:latest",
        "docker.io/ai/gemma3:latest",
    ),
    (
        "docker.io/library/gemma3",
        "docker.io/library/gemma3:latest",
        "docker.io/library/gemma3:latest",
        "docker.io/library/gemma3:latest",
    ),
    (
        "index.docker.io/gemma3",
        "index.docker.io/gemma3:latest",
        "docker.io/ai/gemma3:latest",
        "docker.io/ai/gemma3:latest",
    ),
    (
        "library/gemma3",
        "library/gemma3:latest",
        "docker.io/library/gemma3:latest",
        "docker.io/library/gemma3:latest",
    ),
    ("localhost/foo", "localhost/foo:latest", "localhost/foo:latest", "localhost/foo:latest"),
    (
        "localhost:5000/foo",
        "localhost:5000/foo:latest",
        "localhost:5000/foo:latest",
        "localhost:5000/foo:latest",
    ),
    (
        "localhost:5000/a/b:v1",
        "localhost:5000/a/b:v1",
        "localhost:5000/a/b:v1",
        "localhost:5000/a/b:v1",
    ),
    (
        "localhost:5000",
        "ai/localhost:5000",
        "docker.io/ai/localhost:5000",
        "docker.io/ai/localhost:5000",
    ),
    (
        "registry.example.com/model:v1",
        "registry.example.com/model:v1",
        "registry.example.com/model:v1",
        "registry.example.com/model:v1",
    ),
    (
        "registry.example.com:8443/Org/Model:V1",
        "registry.example.com:8443/org/model:V1",
        "registry.example.com:8443/org/model:V1",
        ERROR,
    ),
    ("[::1]:5000/m", "[::1]:5000/m:latest", "[::1]:5000/m:latest", "[::1]:5000/m:latest"),
    (
        "hf.co/Org/Model",
        "huggingface.co/org/model:latest",
        "huggingface.co/org/model:latest",
        ERROR,
    ),
    (
        "hf.co/Org/Model:Q4_K_M",
        "huggingface.co/org/model:Q4_K_M",
        "huggingface.co/org/model:Q4_K_M",
        ERROR,
    ),
    (
        "huggingface.co/Org/Model:UD-Q4_K_XL",
        "huggingface.co/org/model:UD-Q4_K_XL",
        "huggingface.co/org/model:UD-Q4_K_XL",
        ERROR,
    ),
    ("HF.co/Org/Model", "hf.co/org/model:latest", "hf.co/org/model:latest", ERROR),
    (
        f"ai/gemma3@sha256:{H64}",
        f"ai/gemma3@sha256:{H64}",
        f"docker.io/ai/gemma3@sha256:{H64}",
        f"docker.io/ai/gemma3@sha256:{H64}",
    ),
    # Docker drops the digest here; we keep both, because `tag@digest` must check both.
    (
        f"ai/gemma3:v1@sha256:{H64}",
        f"ai/gemma3:v1@sha256:{H64}",
        f"docker.io/ai/gemma3:v1@sha256:{H64}",
        f"docker.io/ai/gemma3:v1@sha256:{H64}",
    ),
    (
        f"gemma3@sha256:{H64}",
        f"ai/gemma3@sha256:{H64}",
        f"docker.io/ai/gemma3@sha256:{H64}",
        f"docker.io/ai/gemma3@sha256:{H64}",
    ),
    ("ai/gemma3@sha256:abcd", "ai/gemma3@sha256:abcd", ERROR, ERROR),
    ("AI/gemma3", "ai/gemma3:latest", "docker.io/ai/gemma3:latest", "AI/gemma3:latest"),
    ("a//b", "a//b:latest", ERROR, ERROR),
    ("-x", "ai/-x:latest", ERROR, ERROR),
    ("a_b__c", "ai/a_b__c:latest", "docker.io/ai/a_b__c:latest", "docker.io/ai/a_b__c:latest"),
    ("a___b", "ai/a___b:latest", ERROR, ERROR),
    ("x:.bad", "ai/x:.bad", ERROR, ERROR),
    ("org/name.", "org/name.:latest", ERROR, ERROR),
    ("gemma3:latest:extra", "ai/gemma3:latest:extra", ERROR, ERROR),
]


@pytest.fixture(autouse=True)
def _no_default_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEFAULT_REGISTRY", raising=False)


@pytest.mark.parametrize(("text", "expected", "lenient", "strict"), TABLE)
def test_table(text: str, expected: str, lenient: str | None, strict: str | None) -> None:
    assert normalized(text) == expected
    for wanted, is_strict in ((lenient, False), (strict, True)):
        if wanted is None:
            with pytest.raises(InvalidReferenceError, match="invalid reference"):
                Reference.parse(text, strict=is_strict)
        else:
            assert str(Reference.parse(text, strict=is_strict)) == wanted


@pytest.mark.parametrize(
    ("text", "familiar"),
    [
        ("gemma3", "gemma3"),
        ("docker.io/ai/gemma3:v1", "gemma3:v1"),
        ("docker.io/library/x", "library/x"),
        ("localhost:5000/ai/x:latest", "localhost:5000/ai/x"),
        (f"gemma3@sha256:{H64}", f"gemma3@sha256:{H64}"),
        (f"gemma3:latest@sha256:{H64}", f"gemma3:latest@sha256:{H64}"),
    ],
)
def test_familiar_form_reads_back(text: str, familiar: str) -> None:
    reference = Reference.parse(text)
    assert reference.familiar == familiar
    assert Reference.parse(familiar) == reference


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("a" * 256, "more than the limit of 255"),
        ("x:" + "t" * 129, "is not a tag"),
        ("exa mple.com/x", "is not a name component|not a registry"),
        ("-bad.example.com/x", "not a registry"),
        ("h.example:123456/x", "not a registry"),
        ("h.example:65536/x", "not a registry"),
        ("[1:2]:5000/x", "not a registry"),
        ("h.example/x@sha512:" + "0" * 64, "128"),
        ("http://h.example/x", "component|registry"),
        ("h.example/x?y=1", "not a name component"),
        ("h.example/../x", "not a name component"),
    ],
)
def test_errors_say_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(InvalidReferenceError, match=says) as caught:
        Reference.parse(text)
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, ValueError)


def test_default_registry() -> None:
    parse = Reference.parse
    assert str(parse("x", default_registry="r.example:5000")) == "r.example:5000/ai/x:latest"
    assert str(parse("o/x", default_registry="r.example")) == "r.example/o/x:latest"
    assert str(parse("localhost/x", default_registry="r.example")) == "localhost/x:latest"
    assert str(parse("docker.io/x", default_registry="r.example")) == "docker.io/ai/x:latest"


def test_default_registry_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEFAULT_REGISTRY", "r.example")
    assert str(Reference.parse("gemma3")) == "r.example/ai/gemma3:latest"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (H64, True),
        (H64[:12], True),
        (f"sha256:{H64}", True),
        (H64[:11], False),
        (H64.upper(), False),
        (f"sha256:{H64[:12]}", False),
        (f"sha512:{H64}{H64}", True),
        (f"blake3:{H64}", True),
        (f"sha512:{H64}", False),
        (f"md5:{H64}", False),
        ("gemma3", False),
    ],
)
def test_model_ids(text: str, expected: bool) -> None:
    assert is_model_id(text) is expected


word = st.text("abz019", min_size=1, max_size=5)
component = st.builds(
    lambda first, rest: first + "".join(s + w for s, w in rest),
    word,
    st.lists(st.tuples(st.sampled_from([".", "_", "__", "-", "---"]), word), max_size=3),
)
tags = st.builds(
    "{}{}".format,
    st.sampled_from("aZ0_"),
    st.text("aZ0_.-", max_size=127),
)
registries = st.sampled_from(["docker.io", "localhost", "localhost:5000", "r.example", "[::1]:1"])
digests = st.text("0123456789abcdef", min_size=64, max_size=64).map(lambda h: Digest("sha256", h))


@given(registries, st.lists(component, min_size=2, max_size=4), tags, st.none() | digests)
def test_parse_reads_what_str_writes(
    registry: str, parts: list[str], tag: str, digest: Digest | None
) -> None:
    reference = Reference(registry, "/".join(parts), tag, digest)
    assert Reference.parse(str(reference)) == reference
    assert Reference.parse(str(reference), strict=True) == reference
    assert Reference.parse(reference.familiar) == reference


@given(st.text(string.printable + "é漢\0", max_size=80))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except InvalidReferenceError:
        return
    assert Reference.parse(str(reference)) == reference


_texts = st.one_of(
    st.from_regex(
        r"(docker\.io|index\.docker\.io|hf\.co|localhost|h|a\.b|A\.b|127\.0\.0\.1:5000|\[::1\]:5)?"
        r"/?[a-zA-Z._-]{0,3}(/[a-z0-9:@.]{0,4}){0,2}(:[a-zA-Z0-9._-]{0,4})?[ \n]?",
        fullmatch=True,
    ),
    st.text(max_size=12),
)


@given(_texts)
def test_what_is_in_full_at_a_glance(text: str) -> None:
    """The fast paths of the store's index never return a wrong result, but may return none."""
    try:
        parsed = Reference.parse(text, default_registry="docker.io")
    except InvalidReferenceError:
        parsed = None
    quick = parse_full(text)
    if quick is not None:
        assert quick == parsed
        assert str(quick) == text
    if text and is_full_or_invalid(text) and parsed is not None:
        assert str(parsed) == text


@pytest.mark.parametrize("text", ["a.b/c:d", "127.0.0.1:5000/ai/x:v1.0_a", "docker.io/ai/x:latest"])
def test_usual_names_take_the_short_cut(text: str) -> None:
    assert parse_full(text) is not None
    assert is_full_or_invalid(text)
