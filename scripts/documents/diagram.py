"""docs/architecture.svg: the packages in layers. `python -m scripts.documents.diagram` writes it.

`tests/docs/test_diagram.py` holds it to the code: all packages are there, imports go down only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

TARGET = Path(__file__).parents[2] / "docs" / "architecture.svg"


@dataclass(frozen=True)
class Layer:
    """Packages, or modules, that stand beside each other, and what they are for."""

    parts: tuple[str, ...]
    about: str


#: From the top: each may import what is below it.
MODELPACK = (
    Layer(("cli", "testing"), "arguments to one call to output; a registry for users' tests"),
    Layer(("deployment",), "Compose, Kubernetes, vLLM"),
    Layer(("operations",), "the verbs: package, push, pull, copy, resolve, bundle …"),
    Layer(("linting",), "what a catalogue asks of models"),
    Layer(("supply",), "signatures, trust, bills of materials, licences"),
    Layer(("gateway",), "keys, limits and traces before any application"),
    Layer(("server",), "the embedded registry: HTTP over a store"),
    Layer(("hub",), "the Hugging Face Hub, read like a registry"),
    Layer(
        ("packaging", "stores", "registry", "unpacking"),
        "files to a model; models on this machine; in a registry; in a directory",
    ),
    Layer(("formats",), "GGUF, safetensors and DDUF, within limits"),
    Layer(("storage", "model"), "what every source and target of a model can do"),
    Layer(("manifest", "config", "lockfile"), "documents, parsed once, with their bytes"),
    Layer(("reference", "descriptor", "progress"), "names, and what they lead to"),
    Layer(("digest", "mediatypes", "gojson", "paths"), "values that need nothing else"),
    Layer(("errors",), "the one exception tree"),
)
SERVING = (
    Layer(("server",), "HTTP: OpenAI, Anthropic, Ollama, Docker Model Runner, the chat page"),
    Layer(("pool",), "many models: loaded, unloaded, pinned, set up"),
    Layer(("conversation",), "a conversation to the deltas of its answer"),
    Layer(("embedding",), "vectors and rankings"),
    Layer(("structured",), "grammars: which tokens may come next"),
    Layer(("output",), "text, reasoning and calls in what models write"),
)
#: The engine itself, which knows nothing of the layers above; no order is meant.
ENGINE = (
    Layer(("engine", "async_engine", "scheduler", "block_manager"), "schedule, run, sample"),
    Layer(("loaders",), "files of a model to mlx-lm's model and a tokenizer"),
    Layer(("templates", "worker"), "chat templates, rendered in a process with limits"),
    Layer(("attention", "adaptation", "fusion", "recurrence"), "unmodified models on rows"),
    Layer(("sampling", "speculation"), "which token comes next; several at once"),
    Layer(("offload", "parallel", "llama_cpp"), "prefixes on disk; many devices; another backend"),
)  # fmt: skip
BESIDE = ("benchmarking", "server_benchmark")  # measure the engine; in no layer

_WIDTH, _ROW, _GAP, _PAD, _TOP = 560, 40, 6, 12, 46


def draw() -> str:
    """Return the picture; the same layers give the same bytes."""
    left = _column(_PAD, "modelpack: the library and its command line", MODELPACK)
    right = _column(2 * _PAD + _WIDTH, "modelpack_engine: serving", SERVING)
    below = _TOP + len(SERVING) * (_ROW + _GAP) + 34
    core = _column(2 * _PAD + _WIDTH, "the engine itself", ENGINE, below)
    mlx = below + _TOP + len(ENGINE) * (_ROW + _GAP) - 6
    outside = [
        f'<text x="{2 * _PAD + _WIDTH}" y="{mlx + 22}" class="about">below: mlx-lm\'s models, '
        "unmodified, on MLX (CPU, CUDA, Metal)</text>",
        f'<text x="{2 * _PAD + _WIDTH}" y="{mlx + 48}" class="about">modelpack_engine imports '
        "modelpack; modelpack's command line starts the engine, and</text>",
        f'<text x="{2 * _PAD + _WIDTH}" y="{mlx + 64}" class="about">nothing else of modelpack '
        "knows of it.</text>",
    ]
    width = 3 * _PAD + 2 * _WIDTH
    height = max(_TOP + len(MODELPACK) * (_ROW + _GAP), mlx + 70) + _PAD
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="13">\n'
        "<title>The packages of Modelpack in layers: imports go down only</title>\n"
        "<style>.about{fill:#57606a;font-size:11.5px}.part{font-weight:600;fill:#1f2328}"
        ".title{font-size:15px;font-weight:600;fill:#1f2328}</style>\n"
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>\n'
    )
    return head + "\n".join([*left, *right, *core, *outside]) + "\n</svg>\n"


def _column(x: int, title: str, layers: Sequence[Layer], top: int = 0) -> list[str]:
    lines = [f'<text x="{x}" y="{top + 30}" class="title">{escape(title)}</text>']
    for i, layer in enumerate(layers):
        y = top + _TOP + i * (_ROW + _GAP)
        lines += [
            f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_ROW}" rx="4" '
            'fill="#f6f8fa" stroke="#d1d9e0"/>',
            f'<text x="{x + 10}" y="{y + 17}" class="part">{escape(", ".join(layer.parts))}</text>',
            f'<text x="{x + 10}" y="{y + 33}" class="about">{escape(layer.about)}</text>',
        ]
    return lines


if __name__ == "__main__":
    TARGET.write_text(draw())
