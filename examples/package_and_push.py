"""Package a GGUF file with its licence and push it, with progress messages.

python examples/package_and_push.py model.gguf LICENSE registry.example/team/model:v1
"""

from __future__ import annotations

import sys
from pathlib import Path

import modelpack


def main(gguf: Path, license_file: Path, reference: str) -> None:
    def progress(report: modelpack.Progress) -> None:
        if report.finished or report.message:
            print(report.action, report.name, report.message, file=sys.stderr)

    request = modelpack.PackageRequest(gguf=gguf, licenses=(license_file,))
    try:
        made = modelpack.package(reference, request, push=True, progress=progress)
    except modelpack.ModelpackError as error:
        sys.exit(f"{error} ({error.hint})" if error.hint else str(error))
    print(made.digest)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
