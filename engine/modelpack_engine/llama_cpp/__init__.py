"""llama.cpp as a backend for GGUF models on a CPU, with the engine's own scheduler and sampler.

`library` finds llama-cpp-python and chooses the backend, `model` has the model and its KV cache,
`mtmd` encodes pictures, and `engine` runs the steps (read it first).
"""
