"""The command line: parse arguments, make one library call, show its result.

stdout carries only results; progress, notes and errors go to stderr. Exit codes are those of
`modelpack.errors`.
"""
