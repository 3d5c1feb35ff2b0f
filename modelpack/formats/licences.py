"""Recognise the SPDX identifier of a licence by phrases of its text, by its tag or by its name.

An unknown text has no identifier, since a wrong one would be worse. Licences of models that SPDX
does not list have a `LicenseRef-`. GNU licences are identified as "only": their text does not say
whether later versions are allowed.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from modelpack.formats.model_card import ModelCard


class _Text(NamedTuple):
    identifier: str
    phrases: tuple[str, ...]
    without: tuple[str, ...] = ()


_CC = "creative commons attribution{} 4.0 international public license"
_GNU = "gnu {}general public license version {}"
_BSD = ("redistributions of source code must retain", "redistributions in binary form must")

# The first match counts: a licence that contains the phrases of another stands before it.
_TEXTS: Final = (
    _Text("Apache-2.0", ("apache license version 2.0, january 2004", "grant of patent license")),
    _Text(
        "MIT",
        (
            "permission is hereby granted, free of charge, to any person obtaining a copy",
            "the above copyright notice and this permission notice shall be included in all copies",
        ),
        ("the software shall be used for good", "except as contained in this notice"),
    ),
    _Text("BSD-4-Clause", (*_BSD, "all advertising materials", "neither the name")),
    _Text("BSD-3-Clause", (*_BSD, "neither the name")),
    _Text("BSD-2-Clause", _BSD, ("neither the name", "may be used to endorse")),
    _Text("ISC", ("permission to use, copy, modify, and/or distribute this software for any",
                  "appear in all copies")),
    _Text("Unlicense", ("this is free and unencumbered software released into the public domain",)),
    _Text("MPL-2.0", ("mozilla public license version 2.0", "covered software")),
    _Text("AGPL-3.0-only", (_GNU.format("affero ", "3, 19 november 2007"),)),
    _Text("LGPL-3.0-only", (_GNU.format("lesser ", "3, 29 june 2007"),)),
    _Text("LGPL-2.1-only", (_GNU.format("lesser ", "2.1, february 1999"),)),
    _Text("GPL-3.0-only", (_GNU.format("", "3, 29 june 2007"),)),
    _Text("GPL-2.0-only", (_GNU.format("", "2, june 1991"),)),
    _Text("CC-BY-NC-SA-4.0", (_CC.format("-noncommercial-sharealike"),)),
    _Text("CC-BY-NC-ND-4.0", (_CC.format("-noncommercial-noderivatives"),)),
    _Text("CC-BY-NC-4.0", (_CC.format("-noncommercial"),)),
    _Text("CC-BY-SA-4.0", (_CC.format("-sharealike"),)),
    _Text("CC-BY-ND-4.0", (_CC.format("-noderivatives"),)),
    _Text("CC-BY-4.0", (_CC.format(""),)),
    _Text("CC0-1.0", ("cc0 1.0 universal", "affirmer")),
    _Text("LicenseRef-Llama-4", ("llama 4 community license agreement",)),
    _Text("LicenseRef-Llama-3.3", ("llama 3.3 community license agreement",)),
    _Text("LicenseRef-Llama-3.2", ("llama 3.2 community license agreement",)),
    _Text("LicenseRef-Llama-3.1", ("llama 3.1 community license agreement",)),
    _Text("LicenseRef-Llama-3", ("meta llama 3 community license agreement",)),
    _Text("LicenseRef-Llama-2", ("llama 2 community license agreement",)),
    _Text("LicenseRef-Gemma", ("gemma terms of use", "gemma prohibited use policy")),
    _Text("LicenseRef-Qwen-Research", ("qwen research license agreement",)),
    _Text("LicenseRef-Qwen", ("qwen license agreement",)),
    _Text("LicenseRef-BigScience-OpenRAIL-M", ("bigscience open rail-m license",)),
    _Text("LicenseRef-CreativeML-OpenRAIL-M", ("creativeml open rail-m",)),
)  # fmt: skip
_BY_NAME = {one.identifier.lower(): one.identifier for one in _TEXTS} | {
    "gpl-3.0": "GPL-3.0-only",
    "gpl-2.0": "GPL-2.0-only",
    "agpl-3.0": "AGPL-3.0-only",
    "lgpl-3.0": "LGPL-3.0-only",
    "llama3": "LicenseRef-Llama-3",
    "llama3.1": "LicenseRef-Llama-3.1",
    "llama3.2": "LicenseRef-Llama-3.2",
    "llama3.3": "LicenseRef-Llama-3.3",
    "llama4": "LicenseRef-Llama-4",
    "gemma": "LicenseRef-Gemma",
    "qwen": "LicenseRef-Qwen",
    "qwen-research": "LicenseRef-Qwen-Research",
    "bigscience-openrail-m": "LicenseRef-BigScience-OpenRAIL-M",
    "creativeml-openrail-m": "LicenseRef-CreativeML-OpenRAIL-M",
}
# Identifiers of SPDX that model cards use, in lower case, and whose texts are not recognised.
_BY_NAME |= {
    one.lower(): one
    for one in (
        "0BSD", "AFL-3.0", "Artistic-2.0", "BSD-3-Clause-Clear", "BSL-1.0", "C-UDA-1.0",
        "CC-BY-2.0", "CC-BY-2.5", "CC-BY-3.0", "CC-BY-NC-2.0", "CC-BY-NC-3.0", "CC-BY-NC-ND-3.0",
        "CC-BY-NC-SA-2.0", "CC-BY-NC-SA-3.0", "CC-BY-SA-3.0", "CDLA-Permissive-1.0",
        "CDLA-Permissive-2.0", "CDLA-Sharing-1.0", "ECL-2.0", "EPL-1.0", "EPL-2.0",
        "etalab-2.0", "EUPL-1.1", "EUPL-1.2", "LPPL-1.3c", "MS-PL", "NCSA",
        "ODbL-1.0", "ODC-By-1.0", "OFL-1.1", "OSL-3.0", "PDDL-1.0", "PostgreSQL", "WTFPL", "Zlib",
    )
}  # fmt: skip
_TAG = re.compile(r"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.+-]{2,64})[ \t]*(?:\*/|-->)?[ \t]*$",
                  re.MULTILINE)  # fmt: skip
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9.-]+")


def licence_of(text: str) -> str | None:
    """Return the identifier of the licence with this text, tag or name, or None if unknown."""
    tag = _TAG.search(text)
    if tag is not None:
        return licence_named(tag[1]) or tag[1]
    named = licence_named(text)
    if named is not None:
        return named
    plain = _normalized(text)
    for one in _TEXTS:
        if all(phrase in plain for phrase in one.phrases) and not any(
            phrase in plain for phrase in one.without
        ):
            return one.identifier
    return None


def licence_named(name: str) -> str | None:
    """Return the identifier for the short name of a licence in a model card, or None."""
    return _BY_NAME.get(name.strip().lower())


def licence_of_card(card: ModelCard) -> str | None:
    """Return the identifier of the licence that a model card names, or None if it is unknown."""
    return licence_named(card.license) if card.license else None


def licence_expression(name: str) -> str:
    """Return a licence's name as an SPDX expression: a `LicenseRef-` if the name is unknown.

    The result is empty for a name without letters and digits.
    """
    known = licence_named(name)
    if known is not None:
        return known
    text = _NOT_IN_A_NAME.sub("-", name.strip()).strip("-.")
    if not text:
        return ""
    return text if text.startswith("LicenseRef-") else f"LicenseRef-{text}"


def _normalized(text: str) -> str:
    """Return the words of a text in lower case, separated by one blank, without markup."""
    words = re.sub(r"[\"'`“”‘’*_#=>/]+", " ", text.lower())
    words = re.sub(r"\s+", " ", words).replace("–", "-").replace(" ,", ",")
    return words.replace(", version ", " version ").replace("license, version", "license version")
