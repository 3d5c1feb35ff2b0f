"""The projector and the chat template that options of `package` name are ones runtimes can use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import modelpack
from fixtures.weights import STRING, U32, KeyValue, gguf
from modelpack.builder import plan
from modelpack.errors import ModelpackError, PackagingError, WeightFormatError
from modelpack.store.layout import LayoutStore
from tests.packaging.trees import MIT, PROJECTOR, TEMPLATE, TINY, write

LLAMA = gguf([KeyValue("general.architecture", STRING, "llama")], [])
NUMBER = gguf([KeyValue("general.architecture", U32, 7)], [])
NO_ARCHITECTURE = gguf([KeyValue("general.name", STRING, "clip")], [])


def package(root: Path, **files: bytes) -> modelpack.Packaged:
    write(root, {"m.gguf": TINY, **files})
    paths: dict[str, Any] = {option: root / option for option in files}
    request = modelpack.PackageRequest(gguf=root / "m.gguf", **paths)
    return modelpack.package("team/m", request, store=LayoutStore(root / "store"))


def blobs(root: Path) -> list[Path]:
    return [path for path in (root / "store" / "blobs").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("content", "error", "problem"),
    [
        (MIT, WeightFormatError, "expected a GGUF file"),
        (b"GGUF", WeightFormatError, "mmproj"),
        (LLAMA, PackagingError, "its architecture is 'llama', expected 'clip'"),
        (NUMBER, PackagingError, "its architecture is 7"),
        (NO_ARCHITECTURE, PackagingError, "its architecture is none"),
    ],
    ids=["a licence", "truncated", "a language model", "a number", "no architecture"],
)
def test_files_that_are_no_projector(
    tmp_path: Path, content: bytes, error: type[ModelpackError], problem: str
) -> None:
    with pytest.raises(error) as caught:
        package(tmp_path, mmproj=content)
    assert problem in str(caught.value)
    assert blobs(tmp_path) == []


def test_a_projector_that_is_given_as_the_model(tmp_path: Path) -> None:
    write(tmp_path, {"eyes.gguf": PROJECTOR})
    request = modelpack.PackageRequest(gguf=tmp_path / "eyes.gguf")
    with pytest.raises(
        PackagingError, match=r"eyes\.gguf is a projector, which no runtime"
    ) as caught:
        modelpack.package("team/m", request, store=LayoutStore(tmp_path / "store"))
    assert caught.value.hint == "give it by --mmproj, and the model by --gguf"
    assert blobs(tmp_path) == []


def test_a_projector_and_a_template(tmp_path: Path) -> None:
    made = package(tmp_path, mmproj=PROJECTOR, chat_template=TEMPLATE)
    assert len(made.manifest.layers) == 3
    # Files that are added to a stored model are checked, too.
    write(tmp_path, {"LICENSE": MIT})
    request = modelpack.PackageRequest(mmproj=tmp_path / "LICENSE")
    with pytest.raises(WeightFormatError):
        modelpack.package(
            "team/m", request, from_model="team/m", store=LayoutStore(tmp_path / "store")
        )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (MIT, "it has no {{ … }} and no {% … %}"),
        (b"", "it has no {{ … }}"),
        (b"{{ messages }}\xff", "is not UTF-8"),
        (b"{{ messages }}" * 200_000, "has more than 2097152 bytes"),
        (b"{% for message in messages %}", "line 1"),
        (b"{{ .Prompt }}", "line 1"),  # Ollama's Go templates
        (b"{{ messages[0].content | no_such_filter }}", "no_such_filter"),
        (b"{{ raise_exception('not for you') }}", "not for you"),
        (b"{% for i in range(10 ** 9) %}{{ i }}{% endfor %}", "cannot be used"),
    ],
)
def test_files_that_are_no_chat_template(tmp_path: Path, content: bytes, problem: str) -> None:
    with pytest.raises(PackagingError) as caught:
        package(tmp_path, chat_template=content)
    assert str(caught.value).startswith(f"--chat-template {tmp_path / 'chat_template'} ")
    assert problem in str(caught.value)
    assert blobs(tmp_path) == []


def test_without_the_engine_templates_are_not_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(plan, "load_function", missing)
    assert package(tmp_path, chat_template=b"{{ broken").stored
    with pytest.raises(PackagingError, match="is not a Jinja template"):
        package(tmp_path, chat_template=MIT)
