"""References of models on the hub."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack.artifacts.reference import Reference
from modelpack.errors import InvalidReferenceError
from modelpack.hub.reference import HubReference, local_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "parsed", "local"),
    [
        ("hf.co/Org/Model", ("Org", "Model", None, "main"), "org/model:latest"),
        ("huggingface.co/Org/M:Q4_K_M", ("Org", "M", "Q4_K_M", "main"), "org/m:Q4_K_M"),
        ("hf.co/Org/M:latest", ("Org", "M", None, "main"), "org/m:latest"),
        ("hf.co/Org/M:main", ("Org", "M", None, "main"), "org/m:latest"),
        ("hf.co/Org/M:", ("Org", "M", None, "main"), "org/m:latest"),
        ("hf.co/Org/M@v1.0", ("Org", "M", None, "v1.0"), "org/m:v1.0"),
        ("hf.co/Org/M:Q8_0@v1.0", ("Org", "M", "Q8_0", "v1.0"), "org/m:Q8_0-v1.0"),
        (f"hf.co/Org/M@{COMMIT}", ("Org", "M", None, COMMIT), f"org/m:{COMMIT}"),
        ("hf.co/Org/M@refs/pr/1", ("Org", "M", None, "refs/pr/1"), "org/m:refs-pr-1"),
        ("hf://Org/M_2.5", ("Org", "M_2.5", None, "main"), "org/m_2.5:latest"),
        ("https://huggingface.co/Org/M", ("Org", "M", None, "main"), "org/m:latest"),
        ("https://huggingface.co/Org/M/tree/v2", ("Org", "M", None, "v2"), "org/m:v2"),
        (" hf.co/Org/M\n", ("Org", "M", None, "main"), "org/m:latest"),
    ],
)
def test_names_of_the_hub(text: str, parsed: tuple[str, str, str | None, str], local: str) -> None:
    found = HubReference.parse(text)
    assert found is not None
    assert (found.organisation, found.name, found.quantization, found.revision) == parsed
    assert str(found.local) == local_name(text) == f"huggingface.co/{local}"
    assert HubReference.parse(str(found)) == found


@pytest.mark.parametrize(
    "text",
    ["Org/Model", "ai/smollm2", "registry.example/hf.co/x", "HF.co/Org/M", "", "hf.co",
     "hf.co/org/m@sha256:" + "0" * 64],
)  # fmt: skip
def test_names_of_other_places(text: str) -> None:
    assert HubReference.parse(text) is None
    assert local_name(text) == text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("hf.co/model", "expected ORG/NAME, got 'model'"),
        ("hf.co/a/b/c", "expected ORG/NAME, got 'a/b/c'"),
        ("hf.co//b", "'' is not a valid name on the hub"),
        ("hf.co/a/..", "'..' is not a valid name on the hub"),
        ("hf.co/a/b--c", "'b--c' is not a valid name on the hub"),
        ("hf.co/a/b%2f", "'b%2f' is not a valid name on the hub"),
        ("hf.co/a/" + "b" * 97, "is not a valid name on the hub"),
        ("hf.co/a/b@", "'' is not a valid branch, tag or commit"),
        ("hf.co/a/b@../x", "'../x' is not a valid branch, tag or commit"),
        ("hf.co/a/b@a?b", "'a?b' is not a valid branch, tag or commit"),
        ("hf.co/a/b:Q4 K", "'Q4 K' is not a tag"),
    ],
)
def test_names_that_break_the_grammar(text: str, problem: str) -> None:
    with pytest.raises(InvalidReferenceError) as caught:
        HubReference.parse(text)
    assert problem in str(caught.value)


@given(st.text(max_size=60))
def test_any_text_is_a_name_or_an_error(text: str) -> None:
    try:
        found = HubReference.parse("hf.co/" + text)
    except InvalidReferenceError:
        return
    assert found is None or HubReference.parse(str(found)) == found


@pytest.mark.parametrize("text", ["hf.co/Org/Model", "huggingface.co/Org/M:Q4_K_M"])
def test_docker_knows_the_same_names(text: str) -> None:
    found = HubReference.parse(text)
    assert found is not None
    assert found.local == Reference.parse(text)
