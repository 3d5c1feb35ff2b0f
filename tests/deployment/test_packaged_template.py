"""The template of `package --chat-template` is used in every runtime."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import modelpack
from modelpack.errors import PackagingError
from modelpack.operations.resolve import kept_bundle
from modelpack.store.layout import LayoutStore
from modelpack_engine.models import ModelFiles
from modelpack_engine.models.json_tokenizer import chat_template_of
from modelpack_server.stored_models import stored_files
from tests.models import package, tiny_safetensors

PACKAGED, INLINE, OWN = "packaged {{ messages }}", "inline", "own"


def packaged(root: Path, given: str | None, files: dict[str, str]) -> tuple[LayoutStore, Path]:
    """Package a directory with `files` and a template named `given`; return the kept bundle."""
    directory = tiny_safetensors(root)
    for own in directory.glob("*.jinja"):
        own.unlink()
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": INLINE}))
    for name, text in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    template = None
    if given is not None:
        template = root / given
        template.write_text(PACKAGED)
    store = LayoutStore(root / "store")
    package("team/tiny", directory, store, chat_template=template)
    return store, kept_bundle("team/tiny", store=store)[1]


@pytest.mark.parametrize(
    ("given", "files", "used"),
    [
        ("mine.jinja", {}, PACKAGED),
        ("z.jinja", {}, PACKAGED),
        ("template.txt", {}, PACKAGED),
        ("chat_template.jinja", {}, PACKAGED),
        ("mine.jinja", {"chat_template.jinja": OWN}, PACKAGED),
        ("mine.jinja", {"a.jinja": OWN, "special/chat_template.jinja": OWN}, PACKAGED),
        (None, {"chat_template.jinja": OWN, "tool_use.jinja": "tools"}, OWN),
        (None, {"chat_template.jinja": OWN, "a.jinja": "tools"}, OWN),
        (None, {"other.jinja": OWN}, OWN),
        (None, {}, INLINE),
    ],
)
def test_the_packaged_template_is_used(
    tmp_path: Path, given: str | None, files: dict[str, str], used: str
) -> None:
    store, bundle = packaged(tmp_path, given, files)
    # transformers and vLLM prefer chat_template.jinja to tokenizer_config.json.
    laid_out = bundle / "chat_template.jinja"
    assert laid_out.exists() is (used != INLINE)
    if laid_out.exists():
        assert laid_out.read_text() == used
    opened = stored_files(modelpack.inspect("team/tiny", store=store), store)
    for found in (opened, ModelFiles.from_directory(bundle)):
        template = chat_template_of(found)
        assert template is not None
        assert template.source == used


def test_a_template_that_could_not_win_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackagingError, match=r"runtimes would use instead") as caught:
        packaged(tmp_path, "zz.jinja", {"chat_template.jinja": OWN})
    assert "remove chat_template.jinja" in str(caught.value.hint)


def test_a_directory_laid_out_by_hand_says_which_template_it_has(tmp_path: Path) -> None:
    store, _ = packaged(tmp_path, "mine.jinja", {"chat_template.jinja": OWN})
    made = modelpack.bundle("team/tiny", tmp_path / "bundle", store=store)
    assert made.chat_template is not None
    assert made.chat_template.read_text() == PACKAGED
    assert (
        "chat_template.jinja is replaced by mine.jinja, the preferred chat template" in made.notes
    )
