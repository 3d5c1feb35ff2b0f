"""Select some files of a model, for partial pulls."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from modelpack.artifacts.model import Model, ModelFile, Role
from modelpack.errors import NotFoundError


class Part(StrEnum):
    """A group of files that is often pulled alone."""

    CONFIG = "config"  # configuration, tokenizer, chat template
    WEIGHTS = "weights"  # weights and projectors


_ROLES = {
    Part.CONFIG: (Role.CONFIG, Role.CHAT_TEMPLATE),
    Part.WEIGHTS: (Role.WEIGHT, Role.PROJECTOR),
}


@dataclass(frozen=True, slots=True)
class Selection:
    """Conditions that a file must all satisfy to be selected; the model's config always is.

    `include` and `media_types` are as in `Model.select`: each included path must exist. An
    `exclude` is a path, a file name or a glob of either.
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
        """Return the selected files, in layer order.

        Raises `NotFoundError` if no file has such a type or path. `only` may select no files: a
        model in one file includes its configuration.
        """
        files = model.select(self.media_types, self.include)
        if self.only is not None:
            files = tuple(file for file in files if file.role in _ROLES[self.only])
        kept = tuple(file for file in files if not self._is_excluded(file))
        if files and not kept:
            raise NotFoundError(
                f"{model.reference or model.digest}: no files left after excluding "
                + ", ".join(map(repr, self.exclude)),
                hint="run `modelpack inspect --remote` to list its files",
            )
        return kept

    def _is_excluded(self, file: ModelFile) -> bool:
        path = file.filepath
        if path is None:
            return False
        name = path.rpartition("/")[2]
        return any(fnmatchcase(path, glob) or fnmatchcase(name, glob) for glob in self.exclude)
