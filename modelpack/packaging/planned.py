"""What is to be packaged, before a byte of it is hashed."""

from __future__ import annotations

from dataclasses import dataclass, field

from modelpack.formats.statistics import ModelStatistics
from modelpack.packaging.files import LayerFile
from modelpack.packaging.walk import Skipped


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be packaged: the files in the order of layers, and what is known of the model.

    `skipped` was left out of a directory; `notes` are decisions that people should hear of.
    """

    files: tuple[LayerFile, ...]
    statistics: ModelStatistics = field(default_factory=ModelStatistics)
    created: str | None = None
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def total_size(self) -> int:
        """Bytes of all files, which is what there is to hash."""
        return sum(file.size for file in self.files)
