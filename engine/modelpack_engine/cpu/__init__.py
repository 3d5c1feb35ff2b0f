"""The engine's own kernels for CPUs: models of Llama's shape run in a small C++ library.

Read `program` first, which turns a model into a list of operations. `library` declares the C
interface, `weights` packs the files' weights, and `runner` runs the steps of the engine.
"""
