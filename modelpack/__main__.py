"""`python -m modelpack` is the command line."""

from modelpack.cli.main import main

main()
