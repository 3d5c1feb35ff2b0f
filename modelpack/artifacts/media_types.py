"""Media types and annotation keys of OCI, Docker Model Runner, CNCF ModelPack, KitOps and Ollama.

Sources: OCI image-spec v1.1 (media-types.md, annotations.md); Docker Model Runner
(pkg/distribution/types); CNCF model-spec (docs/spec.md, docs/annotations.md).
"""

from __future__ import annotations

from typing import Final

# OCI image-spec
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_EMPTY: Final = "application/vnd.oci.empty.v1+json"
OCI_IMAGE_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
OCI_TAR_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_MANIFEST_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
MANIFEST_TYPES: Final = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEX_TYPES: Final = (OCI_INDEX, DOCKER_MANIFEST_LIST)
MANIFEST_AND_INDEX_TYPES: Final = (*MANIFEST_TYPES, *INDEX_TYPES)

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
# docker/model-spec has this type for LoRA adapters; Docker Model Runner does not write it.
DOCKER_GGUF_LORA: Final = "application/vnd.docker.ai.gguf.v3.lora"

# Ours: an artifact that is an adapter of another model, and its weights (PEFT's or mlx-lm's).
ADAPTER: Final = "application/vnd.modelpack.adapter.v1"
ADAPTER_SAFETENSORS: Final = "application/vnd.modelpack.adapter.v1.safetensors"
# Ours: the artifact type of a drafter, a referrer of the model that it drafts for.
DRAFTER: Final = "application/vnd.modelpack.drafter.v1"

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

# The predecessor of CNCF ModelPack (dragonflyoss/model-spec v0.0.6), read only: modctl 0.2.2 still
# writes it. Its layer types are those of CNCF in another namespace.
CNAI_MANIFEST: Final = "application/vnd.cnai.model.manifest.v1+json"
CNAI_CONFIG: Final = "application/vnd.cnai.model.config.v1+json"
# KitOps ModelKits, read only (pkg/lib/constants/mediaType.go): the config is the Kitfile.
KITOPS_CONFIG: Final = "application/vnd.kitops.modelkit.config.v1+json"
# Ollama's models, read only (manifest/layer.go, server/images.go): the config has the type of an
# image, so only the layers' types identify a model.
DOCKER_IMAGE_CONFIG: Final = "application/vnd.docker.container.image.v1+json"
OLLAMA_LAYER_PREFIX: Final = "application/vnd.ollama.image."
OLLAMA_MODEL: Final = "application/vnd.ollama.image.model"
OLLAMA_PROJECTOR: Final = "application/vnd.ollama.image.projector"
OLLAMA_LICENSE: Final = "application/vnd.ollama.image.license"
OLLAMA_TEMPLATE: Final = "application/vnd.ollama.image.template"
OLLAMA_PROMPT: Final = "application/vnd.ollama.image.prompt"  # an older name of the template
OLLAMA_PARAMS: Final = "application/vnd.ollama.image.params"
OLLAMA_SYSTEM: Final = "application/vnd.ollama.image.system"
OLLAMA_MESSAGES: Final = "application/vnd.ollama.image.messages"
OLLAMA_ADAPTER: Final = "application/vnd.ollama.image.adapter"
# Its MLX models (x/create/writer.go, x/create/pipeline.go): a safetensors file for each tensor, and
# the model's JSON files. Both have a field `name`.
OLLAMA_TENSOR: Final = "application/vnd.ollama.image.tensor"
OLLAMA_JSON: Final = "application/vnd.ollama.image.json"

#: Config types of models that Modelpack reads and writes.
MODEL_CONFIG_TYPES: Final = (DOCKER_CONFIG_V01, DOCKER_CONFIG_V02, CNCF_CONFIG)
#: Config types of models that Modelpack reads and converts, but never writes.
FOREIGN_CONFIG_TYPES: Final = (CNAI_CONFIG, KITOPS_CONFIG, DOCKER_IMAGE_CONFIG)

# Annotation keys
FILEPATH: Final = "org.cncf.model.filepath"
FILEPATH_ALIAS: Final = "org.cnai.model.filepath"  # older key, read only, as in modctl
FILE_METADATA: Final = "org.cncf.model.file.metadata+json"
FILE_UNTESTED: Final = "org.cncf.model.file.mediatype.untested"
REF_NAME: Final = "org.opencontainers.image.ref.name"
CONTAINERD_NAME: Final = "io.containerd.image.name"
TITLE: Final = "org.opencontainers.image.title"
SOURCE: Final = "org.opencontainers.image.source"
REVISION: Final = "org.opencontainers.image.revision"
# On an adapter or drafter: the manifest's digest and the reference of the model that it changes.
BASE_DIGEST: Final = "org.opencontainers.image.base.digest"
BASE_NAME: Final = "org.opencontainers.image.base.name"
# Ours, on an adapter.
ADAPTER_KIND: Final = "org.modelpack.adapter"  # lora, dora
ADAPTER_RANK: Final = "org.modelpack.adapter.rank"  # the largest of all targets, in decimal
ADAPTER_TARGETS: Final = "org.modelpack.adapter.targets"  # names of modules, with commas
# Ours, on a drafter: eagle3, gemma4-assistant; eagle3 where it is missing.
DRAFTER_KIND: Final = "org.modelpack.drafter"
MODEL: Final = "org.modelpack.model"  # ours, on an image: the digest of the model in it
# Ours, on the manifests of an index, each of which is a variant of the model for some machines.
VARIANT: Final = "org.modelpack.variant"  # the name of the variant
VARIANT_FORMAT: Final = "org.modelpack.variant.format"  # gguf, safetensors, dduf, mlx
VARIANT_QUANTIZATION: Final = "org.modelpack.variant.quantization"
VARIANT_SIZE: Final = "org.modelpack.variant.size"  # bytes of all files, in decimal
# Ours, on a model: defaults for requests, as JSON.
DEFAULTS: Final = "dev.modelpack.defaults+json"
# Ours, on the entries of a store's index.json.
PARTIAL: Final = "org.modelpack.partial"  # "true": a partial pull left out layers
ORIGIN: Final = "org.modelpack.origin"  # the registry/repository that the model was pulled from
