"""All configurations of the zoo."""

from __future__ import annotations

from tests.engine.zoo.configuration import Configuration
from tests.engine.zoo.dense import DENSE, SLIDING
from tests.engine.zoo.experts import EXPERTS
from tests.engine.zoo.latent import LATENT
from tests.engine.zoo.others import OTHERS
from tests.engine.zoo.recurrent import RECURRENT

CATALOGUE: list[Configuration] = sorted(
    [*DENSE, *SLIDING, *EXPERTS, *LATENT, *RECURRENT, *OTHERS], key=lambda c: c.id.lower()
)
