"""The selection of a model's files in a repository."""

from __future__ import annotations

import pytest

from modelpack.errors import AmbiguousError, ModelpackError, NotFoundError, PackagingError
from modelpack.hub.reference import HubReference
from modelpack.hub.repository import HubFile
from modelpack.hub.selection import choose, is_quantization, quantization_of


def chosen(paths: str, quantization: str | None = None) -> str:
    files = [HubFile(path, 1, "0" * 40) for path in reversed(paths.split())]
    return " ".join(f.path for f in choose(files, HubReference("o", "m", quantization)).files)


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("Model-Q4_K_M.gguf", "Q4_K_M"),
        ("Model-Q4_K.gguf", "Q4_K"),
        ("model.q8_0.gguf", "Q8_0"),
        ("model_Q5_K_S.gguf", "Q5_K_S"),
        ("Qwen2.5-7B-IQ4_XS.gguf", "IQ4_XS"),
        ("M-UD-Q4_K_XL-00001-of-00002.gguf", "UD-Q4_K_XL"),
        ("BF16/model-00001-of-00003.gguf", "BF16"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("bitnet-TQ2_0.gguf", "TQ2_0"),
        ("model-f16.gguf", "F16"),
        ("Q2-model-Q6_K.gguf", "Q6_K"),
        ("tiny.gguf", None),
        ("Qwen-72B.gguf", None),
    ],
)
def test_labels(path: str, label: str | None) -> None:
    assert quantization_of(path) == label
    assert label is None or is_quantization(path, label.lower())


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("Model-Q4_K_M.gguf", "Q4_K"),
        ("Model-Q4_K.gguf", "Q4_K_M"),
        ("Model-UD-Q4_K_XL.gguf", "Q4_K_XL"),
        ("Model-Q4_K_M.gguf", "M"),
        ("Model-bf16.gguf", "F16"),
        ("Model-Q4_0_4_4.gguf", "Q4_0"),
    ],
)
def test_a_part_of_a_label_is_another(path: str, wanted: str) -> None:
    assert not is_quantization(path, wanted)


QUANTS = "m-Q4_K.gguf m-Q4_K_M.gguf m-Q8_0.gguf"


@pytest.mark.parametrize(
    ("paths", "quantization", "expected"),
    [
        ("tiny.gguf", None, "tiny.gguf"),
        (QUANTS, None, "m-Q4_K_M.gguf"),
        (QUANTS, "Q4_K", "m-Q4_K.gguf"),
        (QUANTS, "q8_0", "m-Q8_0.gguf"),
        (QUANTS, "m-Q8_0", "m-Q8_0.gguf"),
        ("a-8bit.gguf a-4bit.gguf", "8bit", "a-8bit.gguf"),
        (
            "m-Q4_0-00001-of-00002.gguf m-Q4_0-00002-of-00002.gguf m-Q8_0.gguf", "Q4_0",
            "m-Q4_0-00001-of-00002.gguf m-Q4_0-00002-of-00002.gguf",
        ),
        (
            "F16/m-00001-of-00002.gguf F16/m-00002-of-00002.gguf Q4/m.gguf", "f16",
            "F16/m-00001-of-00002.gguf F16/m-00002-of-00002.gguf",
        ),
        (
            "LICENSE README.md chat_template.jinja config.json m-Q4_0.gguf mmproj-m-bf16.gguf "
            "mmproj-m-f16.gguf mmproj-m-f32.gguf .gitattributes card.png x/LICENSE", None,
            "LICENSE README.md chat_template.jinja m-Q4_0.gguf mmproj-m-f16.gguf",
        ),
        (
            "LICENSE README.md config.json generation_config.json merges.txt model.safetensors "
            "pytorch_model.bin tf_model.h5 flax_model.msgpack tokenizer.json tokenizer.model "
            "modeling_x.py onnx/model.onnx original/consolidated.00.pth original/params.json "
            ".gitattributes assets/card.png preview.png training_args.bin", None,
            "LICENSE README.md config.json generation_config.json merges.txt model.safetensors "
            "modeling_x.py tokenizer.json tokenizer.model",
        ),
        (
            "config.json consolidated.safetensors model-00001-of-00002.safetensors "
            "model-00002-of-00002.safetensors model.safetensors.index.json params.json", None,
            "config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors "
            "model.safetensors.index.json params.json",
        ),
        (
            "model_index.json unet/m.safetensors unet/m.fp16.safetensors vae/m.fp16.safetensors",
            None, "model_index.json unet/m.safetensors vae/m.fp16.safetensors",
        ),
        ("1_Pooling/config.json model.safetensors", None,
         "1_Pooling/config.json model.safetensors"),
        ("model.safetensors m-Q4_0.gguf", None, "model.safetensors"),
        ("model.safetensors m-Q4_0.gguf", "Q4_0", "m-Q4_0.gguf"),
        ("consolidated.safetensors params.json", None, "consolidated.safetensors params.json"),
        ("README.md m.dduf", None, "README.md m.dduf"),
    ],
)  # fmt: skip
def test_choices(paths: str, quantization: str | None, expected: str) -> None:
    assert chosen(paths, quantization) == expected


@pytest.mark.parametrize(
    ("paths", "quantization", "kind", "problem"),
    [
        ("m-Q4_K_M.gguf m-Q8_0.gguf", "Q4_K", NotFoundError,
         "no GGUF has the quantisation Q4_K; there are: Q4_K_M, Q8_0"),
        ("m-Q2_K.gguf m-Q8_0.gguf", None, NotFoundError,
         "no GGUF has the quantisation Q4_K_M (the default); there are: Q2_K, Q8_0"),
        ("a-Q4_0.gguf b-Q4_0.gguf", "Q4_0", AmbiguousError,
         "several models have the quantisation Q4_0: a-Q4_0, b-"),
        ("model.safetensors", "Q4_0", NotFoundError, "has no GGUF, so no quantisation Q4_0"),
        ("m-00001-of-00003.gguf m-00003-of-00003.gguf", None, PackagingError,
         "shards are missing: m-00002-of-00003.gguf"),
        ("pytorch_model.bin config.json", None, PackagingError,
         "Python pickles only, which can run code when they are loaded: pytorch_model.bin"),
        ("README.md", None, PackagingError, "no weights (.safetensors, .gguf, .dduf)"),
        ("", None, PackagingError, "no weights"),
        ("mmproj-f16.gguf", None, PackagingError, "only GGUF files are projectors"),
        ("mmproj-f16.gguf", "F16", NotFoundError, "has no GGUF"),
        ("a.dduf b.dduf", None, AmbiguousError, "several DDUF files: a.dduf, b.dduf"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen(
    paths: str, quantization: str | None, kind: type[ModelpackError], problem: str
) -> None:
    with pytest.raises(kind) as caught:
        chosen(paths, quantization)
    assert problem in str(caught.value)
