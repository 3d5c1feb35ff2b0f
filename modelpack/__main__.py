"""Run the command line: `python -m modelpack`."""

from modelpack.cli.main import main

main()
