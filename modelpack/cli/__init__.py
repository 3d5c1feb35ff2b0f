"""The command line: each command parses its arguments, calls the library and shows the result.

stdout carries only results; progress, notes and errors go to stderr. Exit codes are those of
`modelpack.errors`.
"""
