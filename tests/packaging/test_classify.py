"""The kinds of files by name."""

from __future__ import annotations

import pytest

from modelpack.builder.classify import FileKind, classify, is_pickle


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("m.gguf", FileKind.GGUF),
        ("M.GGUF", FileKind.GGUF),
        ("license.gguf", FileKind.GGUF),
        ("mmproj-f16.gguf", FileKind.GGUF),
        ("a/b/model.safetensors", FileKind.SAFETENSORS),
        ("chat_template.safetensors", FileKind.SAFETENSORS),
        ("x.dduf", FileKind.DDUF),
        ("gguf", FileKind.OTHER),
        ("x.gguf.txt", FileKind.CONFIG),
        ("x.jinja", FileKind.CHAT_TEMPLATE),
        ("license.jinja", FileKind.CHAT_TEMPLATE),
        ("chat_template.json", FileKind.CHAT_TEMPLATE),
        ("my_CHAT_TEMPLATE_old", FileKind.CHAT_TEMPLATE),
        ("chat-template.json", FileKind.CONFIG),
        ("chat_template/x.json", FileKind.CONFIG),
        ("LICENSE", FileKind.LICENSE),
        ("UNLICENSE", FileKind.LICENSE),
        ("Licence.md", FileKind.LICENSE),
        ("COPYING.LESSER", FileKind.LICENSE),
        ("notice_me.py", FileKind.LICENSE),
        ("L\u0130CENSE", FileKind.LICENSE),
        ("license/x.py", FileKind.OTHER),
        ("README.md", FileKind.CONFIG),
        ("merges.txt", FileKind.CONFIG),
        ("vocab.json", FileKind.CONFIG),
        ("a.vocab", FileKind.CONFIG),
        ("tokenizer.model", FileKind.CONFIG),
        ("Tokenizer.MODEL", FileKind.CONFIG),
        ("spiece.model", FileKind.OTHER),
        ("modeling.py", FileKind.OTHER),
        ("noextension", FileKind.OTHER),
    ],
)
def test_kinds(name: str, kind: FileKind) -> None:
    assert classify(name) is kind


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pytorch_model.bin", True),
        ("a/consolidated.00.pth", True),
        ("X.PT", True),
        ("sd.ckpt", True),
        ("x.pkl", True),
        ("license_head.bin", True),
        ("bin", False),
        ("x.bin.json", False),
        ("x.ptx", False),
        ("x.bin/config.json", False),
    ],
)
def test_pickles(name: str, expected: bool) -> None:
    assert is_pickle(name) is expected
