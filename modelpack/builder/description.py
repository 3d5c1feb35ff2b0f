"""What CNCF's config says about a model beside its statistics, read from the model's files.

Its capabilities, precision, licences, authors and data sets (model-spec, docs/config.md). Docker's
config has no place for them. What the files do not say is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from modelpack.artifacts.config import ModelConfig
from modelpack.artifacts.model import Role
from modelpack.builder.capabilities import LocalFile, capabilities, json_of
from modelpack.formats.gguf import MetadataArray, MetadataValue, read_gguf_header
from modelpack.formats.licences import licence_expression, licence_of
from modelpack.formats.model_card import ModelCard, hub_url

# The names of model-spec, by those of PyTorch, of safetensors and of GGUF's file types.
_PRECISIONS: Final = {
    **{
        name: name
        for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3", "float8_e5m2")
    },
    "float8_e4m3fn": "float8_e4m3",
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "ALL_F32": "float32",
    "MOSTLY_F32": "float32",
    "MOSTLY_F16": "float16",
    "MOSTLY_BF16": "bfloat16",
}
_MAX_TEXT: Final = 1024 * 1024
_MAX_DATASETS: Final = 64


@dataclass(frozen=True, slots=True)
class Description:
    """Fields of the objects `descriptor` and `config` of CNCF's config, as decoded JSON."""

    descriptor: Mapping[str, Any] = field(default_factory=dict, hash=False)
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def added_to(self, config: ModelConfig) -> ModelConfig:
        """Return a CNCF config with these fields; those that it already has stay."""
        return config.with_changes(
            cncf_descriptor={**self.descriptor, **config.cncf_descriptor},
            cncf_config={**self.config, **config.cncf_config},
        )


def describe(files: Sequence[LocalFile], quantization: str) -> Description:
    """Return the description of a model of these files; `quantization` is that of its config.

    Raises `WeightFormatError` for a GGUF file that does not parse.
    """
    weights = [file for file in files if file.role is Role.WEIGHT]
    metadata: Mapping[str, MetadataValue] = {}
    if weights and weights[0].format == "gguf":
        metadata = read_gguf_header(weights[0].path).metadata
    card = _card(files)
    descriptor = {
        "authors": [one for one in (_text(metadata, "general.author"),) if one]
        or list(card.authors),
        "datasetsURL": _datasets_of_gguf(metadata) or [_address(one) for one in card.datasets],
        "licenses": _licences(files, metadata, card),
    }
    precision = _precision(files, quantization)
    config: dict[str, Any] = {"precision": precision} if precision else {}
    config["capabilities"] = capabilities(files, metadata)
    return Description({key: found for key, found in descriptor.items() if found}, config)


def _precision(files: Sequence[LocalFile], quantization: str) -> str:
    """Return the type that the model computes in: that of config.json or of all weights, or ""."""
    config = json_of(files, "config.json")
    places = [config, *(one for one in config.values() if isinstance(one, dict))]
    for key in ("dtype", "torch_dtype"):
        for place in places:
            stated = str(place.get(key, "")).removeprefix("torch.")
            if stated in _PRECISIONS:
                return _PRECISIONS[stated]
    return _PRECISIONS.get(quantization, "")


def _licences(
    files: Sequence[LocalFile], metadata: Mapping[str, MetadataValue], card: ModelCard
) -> list[str]:
    """Return the licence as SPDX expressions: by its name or, without one, by its text."""
    for name, other in (
        (_text(metadata, "general.license"), _text(metadata, "general.license.name")),
        (card.license, card.license_name),
    ):
        stated = other or name if name.lower() in ("other", "") else name
        if stated and (found := licence_expression(stated)):
            return [found]
    texts = [_read(file) for file in files if file.role is Role.LICENSE]
    return list(dict.fromkeys(one for text in texts if (one := licence_of(text)) is not None))


def _datasets_of_gguf(metadata: Mapping[str, MetadataValue]) -> list[str]:
    """Return the data sets: the numbered entries of GGUF, or the list of older files."""
    entry = metadata.get("general.datasets")
    if entry is not None and isinstance(entry.value, MetadataArray):
        named = [one for one in entry.value.items or () if isinstance(one, str) and one]
        return [_address(one) for one in named[:_MAX_DATASETS]]
    return list(dict.fromkeys(_numbered(metadata)))


def _numbered(metadata: Mapping[str, MetadataValue]) -> Iterator[str]:
    for number in range(_MAX_DATASETS):
        prefix = f"general.dataset.{number}."
        texts = {
            key: _text(metadata, prefix + key)
            for key in ("repo_url", "url", "name", "organization")
        }
        if not any(texts.values()):
            return
        named = "/".join(text for text in (texts["organization"], texts["name"]) if text)
        if found := texts["repo_url"] or texts["url"] or _address(named):
            yield found


def _address(dataset: str) -> str:
    """Return the address of a data set that is named as on the Hub; other texts are unchanged."""
    return hub_url(dataset, "datasets") or dataset


def _text(metadata: Mapping[str, MetadataValue], key: str) -> str:
    entry = metadata.get(key)
    return entry.value.strip() if entry is not None and isinstance(entry.value, str) else ""


def _card(files: Sequence[LocalFile]) -> ModelCard:
    card = next((file for file in files if file.filepath.lower() == "readme.md"), None)
    return ModelCard() if card is None else ModelCard.parse(_read(card))


def _read(file: LocalFile) -> str:
    with file.path.open("rb") as stream:
        return stream.read(_MAX_TEXT).decode("utf-8", "replace")
