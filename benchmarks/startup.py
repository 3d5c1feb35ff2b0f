"""Compare `modelpack --version` with a bare `import click` in the same Python."""

from __future__ import annotations

import sys

from measuring import MODELPACK, compare, measure, print_machine


def main() -> None:
    print_machine([MODELPACK, "--version"])
    compare(
        "modelpack --version",
        lambda: measure([MODELPACK, "--version"]),
        lambda: measure([sys.executable, "-c", "import click"]),
        runs=21,
        goal=2,
    )


if __name__ == "__main__":
    main()
