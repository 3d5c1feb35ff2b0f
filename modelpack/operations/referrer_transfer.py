"""What is attached to a model, and what is attached to that, brought along with it."""

from __future__ import annotations

from modelpack.descriptor import Descriptor
from modelpack.digest import Digest
from modelpack.errors import UnsupportedError
from modelpack.manifest import Index, parse_manifest_or_index
from modelpack.operations.transfer import Transfer, transfer
from modelpack.storage import ReferrerSource, Target, Watch

#: Whoever may write to a repository may attach things to a model in it: there has to be an end.
MAX_REFERRERS = 10_000


def transfer_referrers(
    source: ReferrerSource,
    target: Target,
    descriptor: Descriptor,
    raw: bytes,
    *,
    concurrency: int,
    watch: Watch,
) -> tuple[Transfer, ...]:
    """Have in `target` all that is about the manifest `raw`, directly or not; it is there already.

    What is about the manifests of an index counts. Each subject comes before what is about it.
    Raises `UnsupportedError` for more than `MAX_REFERRERS` manifests.
    """
    done: list[Transfer] = []
    seen: set[Digest] = set()
    waiting = _subjects(descriptor, raw)
    while waiting:
        subject = waiting.pop(0)
        for referrer in source.referrers(subject):
            watch.stop.check()
            if referrer.digest in seen:
                continue
            seen.add(referrer.digest)
            if len(seen) > MAX_REFERRERS:
                raise UnsupportedError(
                    f"more than {MAX_REFERRERS} manifests are attached to it",
                    path=str(descriptor.digest),
                    hint="copy the model without them",
                )
            content = source.fetch_manifest(referrer)
            done.append(
                transfer(
                    source, target, referrer, content, None, concurrency=concurrency, watch=watch
                )
            )
            waiting += _subjects(referrer, content)
    return tuple(done)


def _subjects(descriptor: Descriptor, raw: bytes) -> list[Digest]:
    """Return what others may be about: the manifest, and those that it lists if it is an index."""
    document = parse_manifest_or_index(
        raw, f"manifest {descriptor.digest}", media_type=descriptor.media_type
    )
    children = [child.digest for child in document.manifests] if isinstance(document, Index) else []
    return [descriptor.digest, *children]
