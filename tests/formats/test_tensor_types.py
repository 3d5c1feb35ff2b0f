from __future__ import annotations

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from modelpack.formats.tensors import FILE_TYPES, TENSOR_TYPES

# The gguf package counts 8 bytes of scale and sum for Q8_1; ggml stores two halves.
SIZE_OF_Q8_1 = (32, 36)


def test_every_type_of_the_gguf_package_is_known() -> None:
    for number in GGMLQuantizationType:
        kind = TENSOR_TYPES[number.value]
        expected = SIZE_OF_Q8_1 if kind.name == "Q8_1" else GGML_QUANT_SIZES[number]
        assert (kind.name, (kind.block, kind.size)) == (number.name, tuple(expected))


def test_file_types_have_the_numbers_of_llama_cpp() -> None:
    renamed = {"ALL_F32": "F32", "MXFP4_MOE": "MXFP4"}
    for number in LlamaFileType:
        if number is not LlamaFileType.GUESSED:
            name = number.name.removeprefix("MOSTLY_")
            assert FILE_TYPES[number.value] == renamed.get(name, name)


def test_removed_types_are_not_known() -> None:
    assert 4 not in TENSOR_TYPES
    assert 5 not in TENSOR_TYPES
    assert sorted(TENSOR_TYPES) == [0, 1, 2, 3, *range(6, 42)]
