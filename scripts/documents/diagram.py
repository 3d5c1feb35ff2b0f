"""docs/architecture.svg: the three packages in layers, drawn from layers.toml."""

from __future__ import annotations

from xml.sax.saxutils import escape

from scripts.documents.layers import ROOT, Package, packages

TARGET = ROOT / "docs" / "architecture.svg"
_WIDTH, _ROW, _GAP, _PAD, _TOP = 470, 40, 6, 12, 46
# The number of characters that fit into a row.
_FIT = 76


def draw() -> str:
    """Return the picture; the same layers give the same bytes."""
    columns = packages()
    lines = [line for i, package in enumerate(columns) for line in _column(i, package)]
    depth = max(len(package.layers) for package in columns)
    bottom = _TOP + depth * (_ROW + _GAP)
    lines.append(
        f'<text x="{_PAD}" y="{bottom + 18}" class="about">imports go down, and from '
        "modelpack_server to both others; modelpack_engine imports modelpack's formats, errors and "
        "bundles; below it: mlx-lm's models, unmodified, on MLX (CPU, CUDA, Metal)</text>"
    )
    width, height = _PAD + len(columns) * (_WIDTH + _PAD), bottom + 30 + _PAD
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="13">\n'
        "<title>The packages of Modelpack in layers: imports go down only</title>\n"
        "<style>.about{fill:#57606a;font-size:11.5px}.part{font-weight:600;fill:#1f2328}"
        ".title{font-size:15px;font-weight:600;fill:#1f2328}</style>\n"
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>\n'
    )
    return head + "\n".join(lines) + "\n</svg>\n"


def _column(number: int, package: Package) -> list[str]:
    x = _PAD + number * (_WIDTH + _PAD)
    lines = [
        f'<text x="{x}" y="30" class="title">{escape(f"{package.name}: {package.about}")}</text>'
    ]
    for i, layer in enumerate(package.layers):
        y = _TOP + i * (_ROW + _GAP)
        about = layer.about if len(layer.about) <= _FIT else layer.about[: _FIT - 1] + "…"
        lines += [
            f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_ROW}" rx="4" '
            'fill="#f6f8fa" stroke="#d1d9e0"/>',
            f'<text x="{x + 10}" y="{y + 17}" class="part">{escape(", ".join(layer.parts))}</text>',
            f'<text x="{x + 10}" y="{y + 33}" class="about">{escape(about)}</text>',
        ]
    return lines
