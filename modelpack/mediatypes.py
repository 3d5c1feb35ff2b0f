"""Media types and annotation keys, each with where it comes from.

Sources: OCI image-spec v1.1 (media-types.md, annotations.md); Docker Model Runner
(pkg/distribution/types); CNCF model-spec (docs/spec.md, docs/annotations.md).
"""

from __future__ import annotations

from typing import Final

# OCI image-spec
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_EMPTY: Final = "application/vnd.oci.empty.v1+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_MANIFEST_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
MANIFEST_TYPES: Final = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEX_TYPES: Final = (OCI_INDEX, DOCKER_MANIFEST_LIST)

# Docker Model Runner: configs
DOCKER_CONFIG_V01: Final = "application/vnd.docker.ai.model.config.v0.1+json"
DOCKER_CONFIG_V02: Final = "application/vnd.docker.ai.model.config.v0.2+json"
# Docker Model Runner: layers
DOCKER_GGUF: Final = "application/vnd.docker.ai.gguf.v3"
DOCKER_SAFETENSORS: Final = "application/vnd.docker.ai.safetensors"
DOCKER_DDUF: Final = "application/vnd.docker.ai.dduf"
DOCKER_MMPROJ: Final = "application/vnd.docker.ai.mmproj"
DOCKER_CHAT_TEMPLATE: Final = "application/vnd.docker.ai.chat.template.jinja"
DOCKER_LICENSE: Final = "application/vnd.docker.ai.license"
DOCKER_MODEL_FILE: Final = "application/vnd.docker.ai.model.file"
DOCKER_VLLM_CONFIG_TAR: Final = "application/vnd.docker.ai.vllm.config.tar"
DOCKER_DIR_TAR: Final = "application/vnd.docker.ai.dir.tar"

# CNCF ModelPack
CNCF_MANIFEST: Final = "application/vnd.cncf.model.manifest.v1+json"
CNCF_CONFIG: Final = "application/vnd.cncf.model.config.v1+json"
CNCF_WEIGHT_RAW: Final = "application/vnd.cncf.model.weight.v1.raw"
CNCF_WEIGHT_CONFIG_RAW: Final = "application/vnd.cncf.model.weight.config.v1.raw"
CNCF_DOC_RAW: Final = "application/vnd.cncf.model.doc.v1.raw"
CNCF_CODE_RAW: Final = "application/vnd.cncf.model.code.v1.raw"
CNCF_DATASET_RAW: Final = "application/vnd.cncf.model.dataset.v1.raw"
# Older types of Docker Model Runner in the same namespace, read only.
CNCF_WEIGHT_GGUF: Final = "application/vnd.cncf.model.weight.v1.gguf"
CNCF_WEIGHT_SAFETENSORS: Final = "application/vnd.cncf.model.weight.v1.safetensors"

#: Config types that make a manifest a model for us.
MODEL_CONFIG_TYPES: Final = (DOCKER_CONFIG_V01, DOCKER_CONFIG_V02, CNCF_CONFIG)

# Annotation keys
FILEPATH: Final = "org.cncf.model.filepath"
FILEPATH_ALIAS: Final = "org.cnai.model.filepath"  # older key, read only (modctl does the same)
FILE_METADATA: Final = "org.cncf.model.file.metadata+json"
FILE_UNTESTED: Final = "org.cncf.model.file.mediatype.untested"
REF_NAME: Final = "org.opencontainers.image.ref.name"
CONTAINERD_NAME: Final = "io.containerd.image.name"
