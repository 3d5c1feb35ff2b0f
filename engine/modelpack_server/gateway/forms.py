"""Forms with one file (multipart/form-data, RFC 7578), parsed as they arrive and within limits."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

MAX_FIELD = 4096  # bytes of a field
MAX_FIELDS = 16
_LONGEST_BOUNDARY = 70  # RFC 2046, section 5.1.1
# Parsers read other spellings differently: a gateway and its upstream could find two names.
_DISPOSITION = re.compile(
    r'form-data\s*;\s*name=(?:"[^"\\]*"|[^\s;"\\]+)\s*(?:;\s*filename\*?=(?:(?!;\s*name\b).)*)?',
    re.IGNORECASE,
)
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class FormError(Exception):
    """A form that is not valid; `param` names the field, if there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(slots=True)
class _Part:
    """A part of a form; `name` and `is_file` are known after its headers."""

    headers: dict[str, str] = field(default_factory=dict)
    header: bytearray = field(default_factory=bytearray)
    value: bytearray = field(default_factory=bytearray)
    name: str = ""
    is_file: bool = False


class Form:
    """Parses a form whose file is in the field `file`.

    `fields` are the names and values of the other fields, `content` collects the bytes of the file,
    and `size` counts all of them.
    """

    def __init__(self, content_type: str) -> None:
        """Raises `FormError` for another media type."""
        # Imported here: python-multipart is needed for uploads only.
        from python_multipart import MultipartParser
        from python_multipart.multipart import parse_options_header

        media_type, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if (
            media_type != b"multipart/form-data"
            or not boundary
            or len(boundary) > _LONGEST_BOUNDARY
        ):
            raise FormError("expected a form, sent as multipart/form-data", "file")
        self.fields: list[tuple[str, str]] = []
        self.filename: str | None = None
        self.content = bytearray()
        self.size = 0
        self._part = _Part()
        self._ended = False
        self._options = parse_options_header
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._name,
                "on_header_value": self._value,
                "on_header_end": self._header,
                "on_headers_finished": self._start,
                "on_part_data": self._data,
                "on_part_end": self._finish,
                "on_end": self._end,
            },
        )

    def feed(self, piece: bytes) -> None:
        """Parse the next bytes; raises `FormError`."""
        from python_multipart.exceptions import FormParserError

        try:
            self._parser.write(piece)
        except FormParserError as error:
            raise FormError(f"the form is not valid: {error}", "file") from None

    def end(self) -> None:
        """Check that the form is complete; raises `FormError`."""
        if not self._ended:
            raise FormError("the form is not complete", "file")

    def take(self) -> bytes:
        """Return the collected bytes of the file, and forget them."""
        found = bytes(self.content)
        self.content.clear()
        return found

    def _begin(self) -> None:
        self._part = _Part()

    def _name(self, data: bytes, start: int, end: int) -> None:
        self._part.header += data[start:end]

    def _value(self, data: bytes, start: int, end: int) -> None:
        self._part.value += data[start:end]

    def _header(self) -> None:
        part = self._part
        name = part.header.decode("latin-1").lower()
        if name in part.headers:
            raise FormError(f"the form is not valid: a part has two headers {name[:100]!r}")
        part.headers[name] = part.value.decode("latin-1")
        part.header.clear()
        part.value.clear()

    def _start(self) -> None:
        part = self._part
        disposition = part.headers.get("content-disposition", "")
        if not _DISPOSITION.fullmatch(disposition):
            raise FormError(f"the form is not valid: Content-Disposition is {disposition[:100]!r}")
        _, options = self._options(disposition)
        part.name = options.get(b"name", b"").decode(errors="replace")
        filename = options.get(b"filename")
        part.is_file = filename is not None
        if filename is None:
            return
        if part.name != "file" or self.filename is not None:
            raise FormError("expected one file, in the field 'file'", "file")
        text = _UNPRINTABLE.sub("", filename.decode(errors="replace"))
        self.filename = re.split(r"[/\\]", text)[-1][:255] or "file"

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part.is_file:
            self.content += data[start:end]
            self.size += end - start
            return
        self._part.value += data[start:end]
        if len(self._part.value) > MAX_FIELD:
            raise FormError("a field of the form is too long", self._part.name or None)

    def _finish(self) -> None:
        part = self._part
        if part.is_file:
            return
        if len(self.fields) == MAX_FIELDS:
            raise FormError(f"the form has more than {MAX_FIELDS} fields")
        self.fields.append((part.name, part.value.decode(errors="replace")))

    def _end(self) -> None:
        self._ended = True
