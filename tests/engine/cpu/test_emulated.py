"""Products by the kernels for ARM64, compiled by a cross compiler and run by an emulator.

QEMU executes the instructions; no ARM processor is used.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from modelpack_engine.cpu.library import Matrix, Source
from scripts.native.build import FLAGS, KERNELS
from tests.engine.cpu.programs import Array, random_rows
from tests.engine.cpu.test_multiply import DENSE, Numbers, exact, near, product
from tests.peers import require

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("built")]

NATIVE = Path(__file__).parents[3] / "engine/modelpack_engine/cpu/native"
ARM64 = KERNELS["aarch64"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with `emulated.cpp`, for ARM64."""
    made, path = tmp_path_factory.mktemp("arm64"), Path(__file__).with_name("emulated.cpp")
    compiler: list[str | Path] = [require("aarch64-linux-gnu-g++"), *FLAGS, "-I", NATIVE]
    objects: list[Path] = []
    for name, flags in ARM64.items():
        objects.append(made / f"{name}.o")
        kernels: list[str | Path] = [
            *flags,
            f"-DMODELPACK_ISA={name}",
            "-c",
            NATIVE / "kernels.cpp",
        ]
        subprocess.run([*compiler, *kernels, "-o", objects[-1]], check=True)
    program: list[str | Path] = [path, NATIVE / "packing.cpp", *objects, "-static"]
    subprocess.run([*compiler, *program, "-o", made / "emulated"], check=True)
    return made / "emulated"


def run(
    program: Path, kernels: str, source: Source, rows: int, x: Array, processor: str = "max"
) -> tuple[Array, Array]:
    """Return the values of `rows` rows of random weights, and their products with those of x.

    The values are those that this processor reads.
    """
    data = random_rows(source, rows, x.shape[1], rows)
    numbers = map(str, (int(source), rows, x.shape[1], data.nbytes, len(x)))
    found = subprocess.run(
        [require("qemu-aarch64"), "-cpu", processor, program, kernels, *numbers],
        input=data.tobytes() + x.tobytes(), stdout=subprocess.PIPE, check=True, timeout=120,
    ).stdout  # fmt: skip
    weights, products = np.split(np.frombuffer(found, np.float32), [rows * x.shape[1]])
    values = weights.reshape(rows, -1)
    own = Matrix(source, rows, x.shape[1], data)
    np.testing.assert_allclose(values, [own.row(i) for i in range(rows)], rtol=1e-5, atol=1e-6)
    return values.astype(np.float64), products.reshape(len(x), rows)


@pytest.mark.parametrize("kernels", ARM64)
@pytest.mark.parametrize("source", list(Source))
def test_products(source: Source, kernels: str, program: Path) -> None:
    """Any number of rows, of tiles and of columns; exact activations, then rounded ones."""
    shapes = [(16, 1, 256), (45, 7, 256), (90, 17, 768)]
    if source not in (Source.Q4_K, Source.Q6_K):
        shapes.append((34, 3, 96))
    for rows, count, columns in shapes:
        x = exact(count, columns)
        weights, found = run(program, kernels, source, rows, x)
        near(found, product(source, weights, Numbers(x, 0 * x), kernels, rounded=False))
        x = np.random.default_rng(rows).standard_normal((count, columns), np.float32)
        weights, found = run(program, kernels, source, rows, x)
        near(found, product(source, weights, Numbers(x, 0 * x), kernels, rounded=True))


@pytest.mark.parametrize("source", [each for each in Source if each not in DENSE])
def test_codes_have_the_same_products_by_all_kernels(source: Source, program: Path) -> None:
    """Sums of codes are integers, which are exact."""
    x = np.random.default_rng(1).standard_normal((9, 256), np.float32)
    first, *others = (run(program, kernels, source, 45, x) for kernels in ARM64)
    for other in others:
        assert (other[0] == first[0]).all()
        assert (other[1] == first[1]).all()


def test_a_processor_without_an_instruction_does_not_get_it(program: Path) -> None:
    x = exact(1, 32)
    run(program, "portable", Source.Q8_0, 16, x, "cortex-a53")
    run(program, "neon_dot", Source.Q8_0, 16, x, "neoverse-n1")
    for kernels, processor in (("neon_dot", "cortex-a53"), ("neon_bf16", "neoverse-n1")):
        with pytest.raises(subprocess.CalledProcessError, match="exit status 2"):
            run(program, kernels, Source.Q8_0, 16, x, processor)
