"""The headers of weight files, parsed within limits, and the statistics that configs hold.

Start with `statistics`: it detects the format of a file and sums up a model's headers. `gguf`,
`safetensors` and `dduf` parse headers; `shards` finds the files of one model. No tensor data is
read. `config_json`, `model_card` and `licences` read the texts beside weights.
"""
