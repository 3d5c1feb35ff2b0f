"""The metadata of model cards."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelpack.formats.model_card import ModelCard, hub_url

FULL = """---
language:
- en
license: other
license_name: 'the-licence'
datasets:
- team/set
- plain   # a comment
- {"not": a name}
authors: [Ada <ada@example.com>, "Bo: the second"]
base_model: team/base
model-index:
- name: x
  license: not this one
  results: [{{ broken
---
# A model
license: mit
"""
READ = ModelCard(
    "other", "the-licence", ("Ada <ada@example.com>", "Bo: the second"), ("team/set", "plain"),
    ("team/base",),
)  # fmt: skip


@pytest.mark.parametrize(
    ("readme", "card"),
    [
        (FULL, READ),
        (FULL.replace("\n", "\r\n"), READ),
        ("\ufeff" + FULL, READ),
        ("", ModelCard()),
        ("# A model\nlicense: mit\n", ModelCard()),
        ("---\nlicense: mit\n", ModelCard()),  # without an end
        ("---\n---\n", ModelCard()),
        ("---\nlicense: mit\n---", ModelCard("mit")),
        ("---\nlicense: [mit, apache-2.0]\n---\n", ModelCard("mit")),
        ("---\nlicense: no\n---\n", ModelCard("no")),  # not false
        ("---\nlicense: 1.0\n---\n", ModelCard("1.0")),
        ("---\nlicense:\n---\n", ModelCard()),
        ("---\nlicense: {a: b}\n---\n", ModelCard()),
        ("---\nlicense: [mit\n---\n", ModelCard()),
        ("---\nlicense: !!python/object:os.system mit\n---\n", ModelCard("mit")),
        ("---\nauthor: Ada\n---\n", ModelCard(authors=("Ada",))),
        ("---\ndatasets: [\n  a/b,\n  c\n]\n---\n", ModelCard(datasets=("a/b", "c"))),
        ("---\nlicense: mit\nlicense: mit\n---\n", ModelCard("mit")),
        (f"---\ndatasets: {'[' * 5000}\n---\n", ModelCard()),
        (f"---\nauthors: {'a' * 20_000}\n---\n", ModelCard()),
        ("---\nauthors: &a [x, *a ]\n---\n", ModelCard()),
        ("---\nauthors:\n- a\n---\n", ModelCard(authors=("a",))),
    ],
)
def test_cards(readme: str, card: ModelCard) -> None:
    assert ModelCard.parse(readme) == card


@given(st.text() | st.text(alphabet="-:[]{}&*!<>'\"|#? \n\tab").map("---\nlicense: {}\n---".format))
def test_any_text_is_read(readme: str) -> None:
    ModelCard.parse(readme)


@pytest.mark.parametrize(
    ("name", "kind", "url"),
    [
        ("team/base", "", "https://huggingface.co/team/base"),
        ("base", "", ""),
        ("squad", "datasets", "https://huggingface.co/datasets/squad"),
        ("a/b/c", "datasets", ""),
        ("my own data", "datasets", ""),
        ("https://x.example/d", "datasets", ""),
    ],
)
def test_addresses(name: str, kind: str, url: str) -> None:
    assert hub_url(name, kind) == url
