"""`modelpack inspect --header`: what weight files say about themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from modelpack.cli.options import Settings
from modelpack.cli.output import human_size, note, note_reference, one_line, plural, show, table
from modelpack.formats.gguf_metadata import MetadataArray
from modelpack.reference import Reference

if TYPE_CHECKING:
    from modelpack.operations.headers import FileHeader
    from modelpack.operations.remote import RemoteOptions

_MAX_VALUE = 120


def show_headers(settings: Settings, name: str, in_registry: bool, remote: RemoteOptions) -> None:
    """Print the headers of a model's weight files."""
    from modelpack.operations.headers import read_headers

    if in_registry:
        note_reference(settings, name, Reference.parse(name))
        found = read_headers(name, remote=remote, from_registry=True)
        cost = sum(one.bytes_fetched for one in found)
        asked = plural(sum(one.requests for one in found), "request")
        note(settings, f"{asked}, {human_size(cost)}; not verified, since that takes the files")
    else:
        found = read_headers(name, store=settings.store())
    show(settings, {"headers": [_json(one) for one in found]}, "\n\n".join(map(_text, found)))


def _json(read: FileHeader) -> dict[str, Any]:
    value: dict[str, Any] = {
        "file": read.file.filepath,
        "format": read.file.format,
        "digest": str(read.file.descriptor.digest),
        "size": read.header.file_size,
        "dataOffset": read.header.data_offset,
        "metadata": {key: _plain(held) for key, held in _metadata(read)},
        "tensors": [
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "offset": tensor.offset,
                "size": tensor.size,
            }
            for tensor in read.header.tensors
        ],
    }
    if read.requests:
        value |= {"bytesFetched": read.bytes_fetched, "requests": read.requests}
    return value


def _text(read: FileHeader) -> str:
    header = read.header
    name = read.file.filepath or read.file.descriptor.digest
    lines = [
        f"{name}: {read.file.format}, {human_size(header.file_size)}, "
        f"{plural(len(header.tensors), 'tensor')}"
    ]
    for key, held in _metadata(read):
        shown = one_line(str(_plain(held)))
        lines.append(f"  {one_line(key)} = {shown[:_MAX_VALUE]}{'…' * (len(shown) > _MAX_VALUE)}")
    rows = [(t.name, t.dtype, " x ".join(map(str, t.shape))) for t in header.tensors]
    return "\n".join([*lines, table(("TENSOR", "TYPE", "SHAPE"), rows)])


def _metadata(read: FileHeader) -> Iterator[tuple[str, Any]]:
    for key, held in read.header.metadata.items():
        yield key, getattr(held, "value", held)


def _plain(value: Any) -> Any:
    """Return a value as JSON; of a long array its length and type, as the parser keeps no more."""
    if isinstance(value, MetadataArray):
        if value.items is None:
            return f"{value.length} x {value.element_type.name.lower()}"
        return [_plain(item) for item in value.items]
    if isinstance(value, str):
        return value.encode(errors="replace").decode(errors="replace")
    return value if isinstance(value, int | float | bool) else str(value)
