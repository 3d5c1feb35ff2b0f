"""The values of OCI artifacts: digests, references, descriptors, manifests, configs and models.

Start with `model`: a `Model` is a `Manifest` with its `ModelConfig`, and its layers as files. The
parsers check untrusted bytes; encoders write the bytes of Docker Model Runner.
"""
