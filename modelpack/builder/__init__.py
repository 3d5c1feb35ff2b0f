"""Files on disk to the layers, config and manifest of a model.

Start with `plan`: it turns a `PackageRequest` into a `Plan`. `build` makes the config and manifest;
`files` walks directories and describes layers; `classify` names the kind of a file; `conversion`
converts between Docker's format and the CNCF format.
"""
