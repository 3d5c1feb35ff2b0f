"""The statistics in the specification's vectors, for all formats."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelpack.errors import PackagingError, WeightFormatError
from modelpack.formats.gguf import ValueType, read_gguf_header
from modelpack.formats.statistics import (
    dduf_statistics,
    gguf_statistics,
    read_statistics,
    safetensors_statistics,
)
from tests.formats.builders import GGUF, Pair, Tensor, text_pair
from tests.formats.test_dduf import FILES, archive
from tests.formats.vectors import (
    CONFIG_JSON,
    MODEL_SAFETENSORS,
    TINY_GGUF,
    VECTOR_A,
    VECTOR_D,
    as_config,
    put,
)

V = ValueType
BOTH = pytest.mark.parametrize("exact", [False, True])


@BOTH
def test_vector_a(tmp_path: Path, exact: bool) -> None:
    path = put(tmp_path, "tiny.gguf", TINY_GGUF)
    assert as_config(gguf_statistics([path], exact=exact)) == VECTOR_A
    assert as_config(gguf_statistics([read_gguf_header(path)], exact=exact)) == VECTOR_A
    assert as_config(read_statistics([path], exact=exact)) == VECTOR_A


@BOTH
def test_vector_d(tmp_path: Path, exact: bool) -> None:
    path = put(tmp_path, "model.safetensors", MODEL_SAFETENSORS)
    put(tmp_path, "config.json", CONFIG_JSON)
    assert as_config(safetensors_statistics([path], exact=exact)) == VECTOR_D
    assert as_config(read_statistics([str(path)], exact=exact)) == VECTOR_D


def test_vector_f(tmp_path: Path) -> None:
    pairs = [
        text_pair("general.architecture", "llama"),
        text_pair("general.name", "x" * 30),
        Pair("llama.context_length", V.UINT32, 2048),
    ]
    built = GGUF(pairs, [Tensor("token_embd.weight", (4, 2))])
    path = put(tmp_path, "tiny.gguf", built.build())
    assert (built.infos_end, path.stat().st_size) == (224, 256)
    assert gguf_statistics([path], exact=True).size == "0B"
    assert gguf_statistics([path]).size == "32B"


@BOTH
def test_nothing_to_look_at(exact: bool) -> None:
    assert as_config(gguf_statistics([], exact=exact)) == '{"format":"gguf"}'
    assert as_config(safetensors_statistics([], exact=exact)) == '{"format":"safetensors"}'
    assert as_config(dduf_statistics([])) == '{"format":"dduf"}'
    with pytest.raises(PackagingError):
        read_statistics([])


def test_mixed_formats(tmp_path: Path) -> None:
    paths = [put(tmp_path, "a.gguf", TINY_GGUF), put(tmp_path, "b.safetensors", MODEL_SAFETENSORS)]
    with pytest.raises(
        PackagingError, match=r"b\.safetensors is safetensors, but .*a\.gguf is gguf"
    ):
        read_statistics(paths)


@BOTH
def test_a_broken_weight_is_always_an_error(tmp_path: Path, exact: bool) -> None:
    bad = put(tmp_path, "bad.gguf", TINY_GGUF[:-1])
    with pytest.raises(WeightFormatError, match=r"bad\.gguf at byte"):
        gguf_statistics([bad], exact=exact)
    good = put(tmp_path, "a.safetensors", MODEL_SAFETENSORS)
    bad = put(tmp_path, "b.safetensors", MODEL_SAFETENSORS[:-1])
    with pytest.raises(WeightFormatError, match=r"b\.safetensors at byte"):
        safetensors_statistics([good, bad], exact=exact)


@BOTH
def test_dduf(tmp_path: Path, exact: bool) -> None:
    raw = archive(*FILES)
    path = put(tmp_path, "tiny.dduf", raw)
    assert as_config(dduf_statistics([path], exact=exact)) == (
        f'{{"format":"dduf","architecture":"diffusers","size":"{len(raw)}.00B",'
        '"diffusers":{"dduf_file":"tiny.dduf","layout":"dduf"}}'
    )
    with pytest.raises(WeightFormatError):
        read_statistics([put(tmp_path, "bad.dduf", raw[:-1])], exact=exact)
