"""Selection: which files of a model are wanted, where not all of them are."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from modelpack.artifacts.model import Model, ModelFile, Role
from modelpack.errors import NotFoundError


class Part(StrEnum):
    """A kind of files that is often wanted alone."""

    CONFIG = "config"  # what says how the weights are used: configuration, tokenizer, template
    WEIGHTS = "weights"  # weights and projectors


_ROLES = {
    Part.CONFIG: (Role.CONFIG, Role.CHAT_TEMPLATE),
    Part.WEIGHTS: (Role.WEIGHT, Role.PROJECTOR),
}


@dataclass(frozen=True, slots=True)
class Selection:
    """Files that fulfil every condition that is given; the model's config belongs to all.

    `include` and `media_types` are as in `Model.select`: each included path has to be there. An
    `exclude` is a whole path, a file name or a glob of either.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    media_types: tuple[str, ...] = ()
    only: Part | None = None

    @property
    def is_everything(self) -> bool:
        """Whether no condition is given."""
        return not (self.include or self.exclude or self.media_types or self.only)

    def chosen(self, model: Model) -> tuple[ModelFile, ...]:
        """Return the files, in layer order.

        Raises `NotFoundError` if nothing has such a type or path. `only` may leave nothing: a
        model of one file has its configuration in it.
        """
        files = model.select(self.media_types, self.include)
        if self.only is not None:
            files = tuple(file for file in files if file.role in _ROLES[self.only])
        kept = tuple(file for file in files if not self._is_excluded(file))
        if files and not kept:
            raise NotFoundError(
                f"{model.reference or model.digest}: nothing is left after excluding "
                + ", ".join(map(repr, self.exclude)),
                hint="`modelpack inspect --remote` lists its files",
            )
        return kept

    def _is_excluded(self, file: ModelFile) -> bool:
        path = file.filepath
        if path is None:
            return False
        name = path.rpartition("/")[2]
        return any(fnmatchcase(path, glob) or fnmatchcase(name, glob) for glob in self.exclude)
