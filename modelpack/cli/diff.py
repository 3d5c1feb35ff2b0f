"""`modelpack diff`: print the differences of two models, layer by layer."""

from __future__ import annotations

from typing import Any

from modelpack.artifacts.model import ModelFile
from modelpack.cli.help import command
from modelpack.cli.options import (
    REMOTE,
    Settings,
    common_options_without,
    model_argument,
    remote_options,
)
from modelpack.cli.output import human_size, one_line, plural, show
from modelpack.operations.diff import Change, FieldChange, LayerChange, ModelDiff
from modelpack.operations.diff import diff as diff_models
from modelpack.operations.remote import RemoteOptions

_SIGNS = {Change.ADDED: "+", Change.REMOVED: "-", Change.CHANGED: "~", Change.RENAMED: ">"}
_MAX_VALUE = 100


@command()
@model_argument("before")
@model_argument("after", required=False)
@REMOTE
@remote_options
@common_options_without("quiet", "progress")
def diff(
    settings: Settings, before: str, after: str | None, in_registry: bool, remote: RemoteOptions
) -> int:
    """Compare two models layer by layer; exit code 0: identical, 1: different, 2 and up: errors.

    Models are read from the store or, if they are not stored, from their registries. Without AFTER,
    the stored model is compared with the registry's model of the same name.
    """
    settings.failure_code = 2
    found = diff_models(
        before, after, from_registry=in_registry, store=settings.existing_store(), remote=remote
    )
    show(settings, _json(found), _text(found))
    return 0 if found.identical else 1


def _json(found: ModelDiff) -> dict[str, Any]:
    return {
        "identical": found.identical,
        "before": str(found.before.digest),
        "after": str(found.after.digest),
        "bytesNew": found.bytes_new,
        "layersUnchanged": found.unchanged,
        "layers": [
            {
                "change": str(change.kind),
                "before": _file_json(change.before),
                "after": _file_json(change.after),
            }
            for change in found.layers
        ],
        "config": [_field_json(field) for field in found.config],
        "manifest": [_field_json(field) for field in found.manifest],
    }


def _file_json(file: ModelFile | None) -> dict[str, Any] | None:
    if file is None:
        return None
    return {
        "file": file.filepath,
        "role": str(file.role),
        "mediaType": file.media_type,
        "digest": str(file.descriptor.digest),
        "size": file.descriptor.size,
    }


def _field_json(field: FieldChange) -> dict[str, Any]:
    return {"field": field.name, "before": field.before, "after": field.after}


def _text(found: ModelDiff) -> str:
    if found.identical:
        return ""
    lines = [f"--- {_named(found.before)}", f"+++ {_named(found.after)}"]
    lines += [_layer_text(change) for change in found.layers]
    for where, fields in (("config", found.config), ("manifest", found.manifest)):
        for field in fields:
            before, after = _shown(field.before), _shown(field.after)
            lines.append(f"~ {where} {one_line(field.name)}: {before} -> {after}")
    same = f"{plural(found.unchanged, 'layer')} unchanged"
    return "\n".join([*lines, f"{same}, {human_size(found.bytes_new)} to fetch"])


def _named(model: Any) -> str:
    return f"{model.reference or ''} {model.digest}".strip()


def _layer_text(change: LayerChange) -> str:
    before, after = change.before, change.after
    file = before or after
    assert file is not None
    line = f"{_SIGNS[change.kind]} {_path(file)}"
    if change.kind is Change.RENAMED and after is not None:
        return f"{line} -> {_path(after)}"
    if before is None or after is None:
        return f"{line} ({human_size(file.descriptor.size)})"
    if before.media_type != after.media_type:
        line += f": {before.media_type} -> {after.media_type}"
    if before.descriptor.digest != after.descriptor.digest:
        sizes = [human_size(one.descriptor.size) for one in (before, after)]
        digests = [one.descriptor.digest.short for one in (before, after)]
        line += f" {digests[0]} ({sizes[0]}) -> {digests[1]} ({sizes[1]})"
    return line


def _path(file: ModelFile) -> str:
    return one_line(file.filepath or file.media_type)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    text = one_line(str(value))
    return text if len(text) <= _MAX_VALUE else text[:_MAX_VALUE] + "…"
