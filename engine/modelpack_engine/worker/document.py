"""Render the pages of a PDF to pixels, within limits: the part that a worker process runs.

PDFium (the extra `documents`) is a large parser in C++. Files come from clients, so it runs in a
worker process only; forms, which may have scripts, are not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from modelpack_engine.worker.picture import BadPictureError, check_ratio

#: The most pixels on the longer side of a page, and pixels for a point of 1/72 inch.
MAX_PAGE_SIDE = 1568
PAGE_SCALE = 2.0


def count_pages(data: bytes) -> int:
    """Return the number of pages of a PDF; raises `BadPictureError`."""
    with _opened(data) as document:
        return len(document)


def render_page(data: bytes, index: int) -> tuple[int, int, bytes]:
    """Return width, height and the pixels of a page, RGB of 8 bits; raises `BadPictureError`."""
    with _opened(data) as document:
        page = document[index]
        width, height = page.get_size()
        if not (0 < width < math.inf and 0 < height < math.inf):
            raise BadPictureError(f"refused: it has {width:g} x {height:g} points")
        check_ratio(width * PAGE_SCALE, height * PAGE_SCALE)
        scale = min(PAGE_SCALE, MAX_PAGE_SIDE / max(width, height))
        bitmap = page.render(scale=scale, may_draw_forms=False, rev_byteorder=True)
        rgb = bitmap.to_pil().convert("RGB")
        return (*rgb.size, rgb.tobytes())


@contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    import pypdfium2

    try:
        yield pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower():
            raise BadPictureError("refused: it needs a password") from error
        raise BadPictureError("damaged: it is not a valid PDF") from error
    except (IndexError, ValueError) as error:
        raise BadPictureError("damaged: it is not a valid PDF") from error
