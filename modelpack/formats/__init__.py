"""The headers of weight files, parsed within limits, and the statistics that configs hold.

`detect` says which format a file has; `gguf`, `safetensors` and `dduf` read headers; `shards` finds
the files of one model; `statistics` sums them up. Tensor data is never read.
"""
