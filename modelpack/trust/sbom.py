"""The bill of materials of a model: CycloneDX 1.6 with a machine learning component (ML-BOM).

The model is the subject of the document; its files are components, each with the digest of its
layer. Equal models give equal bytes. Source: https://cyclonedx.org/docs/1.6/json/
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from modelpack._version import __version__
from modelpack.artifacts.digest import Digest
from modelpack.artifacts.model import Model, ModelFile
from modelpack.artifacts.reference import Reference
from modelpack.formats.licences import licence_named

#: The media type of the document, as a file and as an attached layer.
CYCLONEDX: Final = "application/vnd.cyclonedx+json"
_SCHEMA: Final = "http://cyclonedx.org/schema/bom-1.6.schema.json"
_ALGORITHMS: Final = {"sha256": "SHA-256", "sha512": "SHA-512", "blake3": "BLAKE3"}
_MIME = re.compile(r"[-+a-z0-9.]+/[-+a-z0-9.]+\Z")
# Our namespace: the documents of one model all have the same serial number.
_NAMESPACE: Final = uuid.UUID("5d0bd3d4-6d3f-5a3e-9d0c-6b2a4a1f7c11")
_ROOT: Final = "model"


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A model that another one was derived from; `url` may be empty."""

    name: str
    url: str = ""


def ml_bom(model: Model, *, licences: Sequence[str] = (), bases: Sequence[BaseModel] = ()) -> bytes:
    """Return the ML-BOM of `model` as JSON; the licences are SPDX identifiers or names."""
    # A layer listed twice with one path is one component.
    unique = {(file.filepath, file.descriptor.digest): file for file in model.files()}
    files = [_file(file) for file in unique.values()]
    value: dict[str, Any] = {
        "$schema": _SCHEMA,
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, str(model.digest))}",
        "version": 1,
        "metadata": _metadata(model, licences, bases),
        "components": files,
        "dependencies": [
            {"ref": _ROOT, "dependsOn": [file["bom-ref"] for file in files]},
            *({"ref": file["bom-ref"]} for file in files),
        ],
    }
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def _metadata(model: Model, licences: Sequence[str], bases: Sequence[BaseModel]) -> dict[str, Any]:
    reference, config = model.reference, model.config
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": _ROOT,
        "name": reference.name if reference is not None else str(model.digest),
        "version": (reference.tag if reference is not None else None) or str(model.digest),
        "hashes": [_hash(model.digest)],
    }
    if reference is not None:
        component["purl"] = package_url(reference, model.digest)
    if licences:
        component["licenses"] = [_licence(one) for one in dict.fromkeys(licences)]
    if bases:
        component["pedigree"] = {"ancestors": [_base(one) for one in bases]}
    if config.architecture:
        component["modelCard"] = {"modelParameters": {"modelArchitecture": config.architecture}}
    facts = {
        "format": config.format,
        "quantization": config.quantization,
        "parameters": config.parameters,
        "contextSize": "" if config.context_size is None else str(config.context_size),
        "size": str(model.manifest.total_size),
    }
    component["properties"] = _properties(facts)
    tool = {"type": "application", "name": "modelpack", "version": __version__}
    metadata = {"tools": {"components": [tool]}, "component": component}
    return {"timestamp": config.created} | metadata if config.created else metadata


def package_url(reference: Reference, digest: Digest) -> str:
    """Return the package URL of a model in a registry (purl-spec, type oci)."""
    name = reference.repository.rpartition("/")[2]
    tag = f"&tag={quote(reference.tag, safe='')}" if reference.tag else ""
    where = quote(reference.name, safe="/")
    return f"pkg:oci/{name}@{quote(str(digest), safe='')}?repository_url={where}{tag}"


def _file(file: ModelFile) -> dict[str, Any]:
    digest = file.descriptor.digest
    name = file.filepath or f"layer {digest.short}"
    value: dict[str, Any] = {
        "type": "file",
        "bom-ref": f"file:{quote(name)}:{digest.short}",
        "name": name,
        "hashes": [_hash(digest)],
        "properties": _properties(
            {"role": str(file.role), "format": file.format, "size": str(file.descriptor.size)}
        ),
    }
    if _MIME.match(file.media_type):
        value["mime-type"] = file.media_type
    return value


def _hash(digest: Digest) -> dict[str, str]:
    return {"alg": _ALGORITHMS[digest.algorithm], "content": digest.encoded}


def _licence(name: str) -> dict[str, Any]:
    """Return a licence by its SPDX identifier, or by its name if SPDX does not list it."""
    known = licence_named(name)
    if known is not None and not known.startswith("LicenseRef-"):
        return {"license": {"id": known}}
    return {"license": {"name": known or name}}


def _base(base: BaseModel) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "machine-learning-model", "name": base.name}
    if base.url:
        value["externalReferences"] = [{"type": "distribution", "url": base.url}]
    return value


def _properties(facts: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": f"modelpack:{key}", "value": text} for key, text in facts.items() if text]
