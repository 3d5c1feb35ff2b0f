"""Blobs from elsewhere: fetched once, resumed, verified while they arrive, then published."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

from modelpack.descriptor import Descriptor
from modelpack.errors import DigestMismatchError, SizeMismatchError, StorageFullError
from modelpack.progress import Action, Progress
from modelpack.storage import BlobSource, Outcome, Watch
from modelpack.stores.blobs import Blobs
from modelpack.stores.disk_space import check_room, no_room
from modelpack.stores.receiving import Receiving
from modelpack.stores.staging import Partial
from modelpack.stores.tree import Tree


@dataclass(frozen=True, slots=True)
class Downloads:
    """Brings blobs into one store."""

    tree: Tree
    blobs: Blobs

    def fetch(self, descriptor: Descriptor, source: BlobSource, watch: Watch) -> Outcome:
        """Have the blob. Two processes that want the same one download it once."""
        name = descriptor.filepath or descriptor.digest.short

        def waiting(holder: str) -> None:
            message = f"{name} is being downloaded by {holder}: waiting"
            watch.report(Progress(Action.NOTE, name, descriptor.digest, message=message))

        lock = Partial.lock(self.tree, descriptor.digest)
        with lock.held(patience=None, stop=watch.stop, waiting=waiting, remove=True):
            if self.blobs.holds(descriptor):
                return Outcome.EXISTED
            with closing(Partial(self.tree, descriptor)) as part:
                self._fill(part, source, watch, name)
                part.seal()
                with self.tree.lock().held():
                    self.blobs.publish(part.path, descriptor.digest, flushed=True)
        return Outcome.WRITTEN

    def _fill(self, part: Partial, source: BlobSource, watch: Watch, name: str) -> None:
        """Download until the part is verified. What is wrong is dropped and tried once again.

        A short or long body is not: it will be so again, unless a resumed part is to blame.
        """
        part.resume(lambda _: watch.stop.check())
        part.journal()
        resumed = part.present > 0
        try:
            self._transfer(part, source, watch, name)
        except (DigestMismatchError, SizeMismatchError) as error:
            part.restart()
            if isinstance(error, SizeMismatchError) and not resumed:
                part.discard()
                raise
            message = f"{error}: trying once more from the start"
            watch.report(Progress(Action.RETRY, name, part.wanted.digest, message=message))
            try:
                self._transfer(part, source, watch, name)
            except (DigestMismatchError, SizeMismatchError):
                part.discard()
                raise

    def _transfer(self, part: Partial, source: BlobSource, watch: Watch, name: str) -> None:
        digest, size = part.wanted.digest, part.wanted.size
        check_room(self.tree.ingest, size - part.present, name)

        def report(completed: int) -> None:
            watch.report(Progress(Action.FETCH, name, digest, completed, size))

        if part.length < size or size == 0:
            try:
                Receiving(part, source, report, watch.stop).run()
            except StorageFullError as error:
                missing = size - part.present
                raise no_room(self.tree.ingest, missing, error.available, name) from error
        else:
            report(size)
        part.check()
