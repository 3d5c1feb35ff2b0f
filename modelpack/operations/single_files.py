"""A model whose layers are archives, or another tool's, as one whose layers are files.

It is laid out in a directory beside the blobs, which is gone afterwards, and taken over from there:
files that were layers before are not copied, those of archives are written once. What a ModelKit
or Ollama says about the model is kept where the formats have a place for it.
"""

from __future__ import annotations

from modelpack import mediatypes, ollama
from modelpack.blob import read_blob
from modelpack.model import Model, Role
from modelpack.operations.taking import take_files
from modelpack.packaging.build import build
from modelpack.packaging.plan import plan
from modelpack.packaging.request import PackageRequest
from modelpack.progress import Action, Progress
from modelpack.storage import Watch
from modelpack.stores.layout import LayoutStore
from modelpack.stores.scratch import scratch_directory
from modelpack.unpacking.bundle import Bundle, lay_out

_BESIDE_A_GGUF = (Role.WEIGHT, Role.LICENSE, Role.CHAT_TEMPLATE, Role.PROJECTOR)
_OPENCONTAINERS = "org.opencontainers.image."
# How Ollama says what the annotation says here, and a template that nobody else reads.
_OLLAMA_ONLY = (
    mediatypes.OLLAMA_PARAMS,
    mediatypes.OLLAMA_SYSTEM,
    mediatypes.OLLAMA_MESSAGES,
    mediatypes.OLLAMA_TEMPLATE,
    mediatypes.OLLAMA_PROMPT,
)


def is_of_single_files(model: Model) -> bool:
    """Whether every layer is one file, of a format that is written here too."""
    return not model.config.is_foreign and not any(file.archive for file in model.files())


def as_single_files(model: Model, store: LayoutStore, watch: Watch) -> Model:
    """Return a stored model in Docker's format, each file a layer of its own in `store`.

    The caller holds a lease: nothing names the files yet, and neither config nor manifest is
    stored. The same model gives the same digest. Raises as `modelpack.bundle` and
    `modelpack.package` do.
    """
    with scratch_directory(store, "files") as directory:
        laid_out = directory / "bundle"
        bundle = lay_out(
            model,
            lambda blob: store.blob_path(blob.digest),
            laid_out,
            watch=watch,
            runtime_names=False,
        )
        request = _request(model, bundle, store, watch)
        planned = plan(request)
        for skipped in planned.skipped:
            message = f"skipped {skipped.path}: {skipped.reason}"
            watch.report(Progress(Action.NOTE, skipped.path, message=message))
        digests = take_files(planned.files, store, True, watch)
        built = build(planned, request, digests)
    config = built.config.with_changes(
        created=model.config.created or built.config.created,
        cncf_descriptor={**model.config.cncf_descriptor},
        cncf_config={**model.config.cncf_config},
    )
    return Model(model.reference, built.manifest.descriptor, built.manifest, config)


def _request(model: Model, bundle: Bundle, store: LayoutStore, watch: Watch) -> PackageRequest:
    said = model.manifest.annotations
    if model.config.is_foreign:  # the rest is of the other tool, as its version
        said = {key: text for key, text in said.items() if key.startswith(_OPENCONTAINERS)}
    annotations = dict(said)
    root = bundle.directory
    files = bundle.files
    if model.manifest.is_ollama:
        usage = ollama.defaults(model.manifest.layers, lambda layer: read_blob(store, layer))
        annotations |= {mediatypes.DEFAULTS: usage} if usage else {}
        own = {x.digest for x in model.manifest.layers if x.media_type in _OLLAMA_ONLY}
        for file in files:
            if file.digest in own:
                (root / file.path).unlink()
            if file.path.endswith("template.gotmpl"):
                why = "left out: a template of Go's; `package --chat-template` adds another"
                watch.report(Progress(Action.NOTE, file.path, message=why))
        files = tuple(file for file in files if file.digest not in own)
    weights = [file for file in files if file.role is Role.WEIGHT]
    beside = all(file.role in _BESIDE_A_GGUF and file.path.count("/") == 1 for file in files)
    kinds = {file.format for file in weights}
    if not beside or len(kinds) > 1 or not kinds <= {"gguf", "dduf"}:
        return PackageRequest(safetensors_dir=root / "model", annotations=annotations)
    return PackageRequest(
        gguf=bundle.weight if kinds == {"gguf"} else None,
        dduf=bundle.weight if kinds == {"dduf"} else None,
        licenses=tuple(root / file.path for file in files if file.role is Role.LICENSE),
        chat_template=bundle.chat_template,
        mmproj=bundle.mmproj,
        annotations=annotations,
    )
