"""Find a model's files by media type without copying the weights; pull the model if needed.

python examples/resolve_by_media_type.py registry.example/team/model:v1
"""

from __future__ import annotations

import sys

import modelpack


def main(reference: str) -> None:
    model = modelpack.resolve(reference, media_types=["*"], pull=True)
    for found in model.files:
        print(f"{found.file.role:14} {found.file.filepath:30} {found.path}")

    [weight, *_] = modelpack.resolve(reference, media_types=["weight"]).files
    with weight.path.open("rb") as stream:
        print("first bytes of the weight:", stream.read(4))


if __name__ == "__main__":
    main(sys.argv[1])
