"""The layers of the code: `python -m scripts.documents.layers` updates the documents about them.

`layers.toml` is the list. CONTRIBUTING.md's map and docs/architecture.svg are generated from it,
and tests/test_layers.py checks the imports against it.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
_BEGIN, _END = "<!-- layers: begin -->\n", "<!-- layers: end -->\n"


@dataclass(frozen=True)
class Layer:
    """Packages and modules that do not import each other, and their purpose."""

    parts: tuple[str, ...]
    about: str


@dataclass(frozen=True)
class Package:
    """A top-level package and its layers, from the top."""

    name: str
    path: Path
    about: str
    layers: tuple[Layer, ...]


def packages() -> tuple[Package, ...]:
    """Return the packages of layers.toml, in order."""
    listed = tomllib.loads(Path(__file__).with_name("layers.toml").read_text())["package"]
    return tuple(
        Package(
            entry["name"],
            ROOT / entry["path"],
            entry["about"],
            tuple(Layer(tuple(row["parts"]), row["about"]) for row in entry["layers"]),
        )
        for entry in listed
    )


def contributing() -> str:
    """Return CONTRIBUTING.md with an updated map."""
    text = CONTRIBUTING.read_text()
    head, _, rest = text.partition(_BEGIN)
    _, _, tail = rest.partition(_END)
    return head + _BEGIN + _map() + _END + tail


def _map() -> str:
    lines = []
    for package in packages():
        lines += [f"`{package.path.relative_to(ROOT)}/`: {package.about}", "", "```text"]
        width = max(len(", ".join(layer.parts)) for layer in package.layers)
        for layer in package.layers:
            lines.append(f"{', '.join(layer.parts):{min(width, 40)}}  {layer.about}")
        lines += ["```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    from scripts.documents.diagram import TARGET, draw

    CONTRIBUTING.write_text(contributing())
    TARGET.write_text(draw())
