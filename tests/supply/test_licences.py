"""SPDX identifiers of real licence texts, tags and names."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelpack.formats.licences import licence_expression, licence_of, licence_of_card
from modelpack.formats.model_card import ModelCard
from tests.conftest import ROOT

DEBIAN = Path("/usr/share/common-licenses")
MIT = """MIT License

Copyright (c) 2026 Somebody

Permission is hereby granted, free of charge, to any person obtaining a copy of this software
and associated documentation files (the "Software"), to deal in the Software without restriction.

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.
"""
BSD = """Redistributions of source code must retain the above copyright notice.
Redistributions in binary form must reproduce it.
"""


@pytest.mark.parametrize(
    ("name", "identifier"),
    [
        ("Apache-2.0", "Apache-2.0"),
        ("CC0-1.0", "CC0-1.0"),
        ("GPL-2", "GPL-2.0-only"),
        ("GPL-3", "GPL-3.0-only"),
        ("LGPL-2.1", "LGPL-2.1-only"),
        ("LGPL-3", "LGPL-3.0-only"),
        ("MPL-2.0", "MPL-2.0"),
        ("Artistic", None),
        ("GFDL-1.3", None),
    ],
)
def test_debians_texts(name: str, identifier: str | None) -> None:
    path = DEBIAN / name
    if not path.exists():
        pytest.skip(f"{path} is there on Debian")
    assert licence_of(path.read_text(errors="replace")) == identifier


@pytest.mark.parametrize(
    ("text", "identifier"),
    [
        ((ROOT / "LICENSE").read_text(), "Apache-2.0"),
        (MIT, "MIT"),
        (MIT.replace("\n", "\r\n   "), "MIT"),
        (MIT + "Except as contained in this notice, the name of X shall not be used", None),
        (MIT + "The Software shall be used for Good, not Evil.", None),
        (BSD, "BSD-2-Clause"),
        (BSD + "Neither the name of the holder may be used to endorse products", "BSD-3-Clause"),
        ("MIT\n", "MIT"),
        ("apache-2.0", "Apache-2.0"),
        ("# SPDX-License-Identifier: EUPL-1.2\n", "EUPL-1.2"),
        ("// SPDX-License-Identifier: mit\n", "MIT"),
        ("Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International Public License",
         "CC-BY-NC-SA-4.0"),
        ("Creative Commons Attribution 4.0 International Public License", "CC-BY-4.0"),
        ("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version", "LicenseRef-Llama-3.1"),
        ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT", "LicenseRef-Llama-3"),
        ("**Gemma Terms of Use** ... Gemma Prohibited Use Policy", "LicenseRef-Gemma"),
        ("All rights reserved.", None),
        ("", None),
    ],
)  # fmt: skip
def test_texts(text: str, identifier: str | None) -> None:
    assert licence_of(text) == identifier


@pytest.mark.parametrize(
    ("card", "identifier"),
    [
        ("---\nlicense: apache-2.0\nlanguage: en\n---\n# M", "Apache-2.0"),
        ('---\ntags: [a]\nlicense: "llama3.2"\n---\n', "LicenseRef-Llama-3.2"),
        ("---\nlicense: other\n---\n", None),
        ("# A model\nlicense: mit\n", None),
        ("text\n---\nlicense: mit\n---\n", None),
    ],
)
def test_model_cards(card: str, identifier: str | None) -> None:
    assert licence_of_card(ModelCard.parse(card)) == identifier


@pytest.mark.parametrize(
    ("name", "expression"),
    [
        ("mit", "MIT"),
        ("cc-by-sa-3.0", "CC-BY-SA-3.0"),
        ("llama3.3", "LicenseRef-Llama-3.3"),
        ("tongyi-qianwen", "LicenseRef-tongyi-qianwen"),
        ("LicenseRef-Ours", "LicenseRef-Ours"),
        ("MIT or so (see LICENSE)", "LicenseRef-MIT-or-so-see-LICENSE"),
        ("¯\\_(ツ)_/¯", ""),
        ("", ""),
    ],
)
def test_expressions(name: str, expression: str) -> None:
    assert licence_expression(name) == expression
