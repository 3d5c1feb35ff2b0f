"""Every architecture generates the same tokens as mlx-lm does for a single request.

Five requests arrive in different steps. Steps are small, so that prompts are chunked and mixed with
decoding. Steps are built ahead, as in the engine. What the table of models says of offload,
speculation and adapters is tried too.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from modelpack_engine.core.buckets import Buckets
from modelpack_engine.engine import Engine
from modelpack_engine.patches.lora import LoRALayers
from modelpack_engine.request import EngineRequest
from tests.engine.offload.turns import BLOCK, FIRST, GREEDY, NEXT, answer, open_turn_engine
from tests.engine.speculation.oracle import Oracle, speculate
from tests.engine.zoo import table
from tests.engine.zoo.catalogue import CATALOGUE
from tests.engine.zoo.configuration import VOCABULARY, prompts
from tests.engine.zoo.driving import Driver, Setting
from tests.engine.zoo.specimen import Specimen, adapter_of, make_specimen
from tests.engine.zoo.table import restores, row, speculates

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=CATALOGUE, ids=lambda configuration: configuration.id)
def specimen(request: pytest.FixtureRequest, uncompiled: None) -> Specimen:
    return make_specimen(request.param)


def test_gate_is_strong(specimen: Specimen) -> None:
    assert specimen.reference.distinct >= 12
    assert specimen.reference.gap > 1e-4


def test_mixed_steps(specimen: Specimen, rows: dict[str, str]) -> None:
    runner = specimen.runner(exact=True)
    driver = specimen.drive(Setting())
    rows[specimen.configuration.id] = row(specimen.configuration, specimen.model, runner)
    stats = driver.scheduler.stats()
    assert driver.tokens == specimen.reference.tokens
    assert stats.num_mixed_steps >= 3
    assert stats.cached_tokens == (32 if runner.supports_prefix_cache else 0)


def test_bucketed_with_preemption(specimen: Specimen) -> None:
    buckets = Buckets(rows=(4, 8), chunk=(8, 16), table_width=(2, 8))
    driver = specimen.drive(Setting(blocks=7, buckets=buckets, exact=False))
    assert driver.tokens == specimen.reference.tokens
    assert driver.scheduler.stats().num_preemptions > 0


def test_offload(specimen: Specimen, tmp_path: Path) -> None:
    """After a restart, a second turn restores the first, and its tokens are the same."""
    model = specimen.free()
    plain = open_turn_engine(model, enable_prefix_caching=False)
    reply, _ = answer(plain, FIRST)
    second = FIRST + reply + NEXT
    expected, _ = answer(plain, second)
    plain.close()
    found = []
    for prompt in (FIRST, second):
        engine = open_turn_engine(model, kv_offload_dir=str(tmp_path / "kv"))
        found.append(answer(engine, prompt))
        yes = restores(engine._runner)
        engine.close()
    restored = len(FIRST) // BLOCK * BLOCK if yes else 0
    assert found == [(reply, len(FIRST)), (expected, len(second) - restored)]


def ask(engine: Engine) -> list[list[int]]:
    """Return the tokens after each of the prompts, which run beside each other."""
    tokens: list[list[int]] = [[] for _ in prompts()]
    for index, prompt in enumerate(prompts()):
        engine.add_request(str(index), EngineRequest(prompt, GREEDY))
    while engine.has_work:
        for event in engine.step():
            tokens[int(event.request_id)] += event.token_ids
    return tokens


def test_speculation(specimen: Specimen) -> None:
    """Right and wrong proposals for every request leave the tokens as they are."""
    engine = open_turn_engine(specimen.free(), speculative_method="ngram")
    yes = speculates(engine._runner)
    assert (engine._speculator is not None) == yes
    assert yes or any("no speculation" in note for note in engine.notes)
    expected = [tokens[: GREEDY.max_tokens] for tokens in specimen.reference.tokens]
    if yes:
        answers = {(str(at), 0): tokens for at, tokens in enumerate(expected)}
        speculate(engine, Oracle(answers, wrong=0.4, wrong_tokens=range(VOCABULARY)))
    assert ask(engine) == expected
    assert (engine.stats().accepted_tokens > 0) == yes
    engine.close()


def test_adapters(specimen: Specimen) -> None:
    """Requests with an adapter on all layers that may have one, beside others without."""
    model = specimen.free()
    layers, found = adapter_of(model), []
    for slots in ((1, 0, 1, 0, 1), (1, 1, 1, 1, 1)):
        runner = specimen.make_runner(exact=True)
        assert runner.adapter_rows is not None
        loras = LoRALayers(model, runner.adapter_rows)
        loras.set(1, layers)
        driver = Driver(runner, Setting())
        for slot, prompt in zip(slots, prompts(), strict=True):
            driver.add(prompt, GREEDY.max_tokens, adapter=slot)
        driver.run()
        found.append(driver.tokens)
        loras.undo()
        runner.undo()
    mixed, adapted = found
    plain = [tokens[: GREEDY.max_tokens] for tokens in specimen.reference.tokens]
    assert mixed == [adapted[0], plain[1], adapted[2], plain[3], adapted[4]]
    assert mixed[0] != plain[0] or mixed[4] != plain[4]


def test_committed_table_is_what_the_code_says(rows: dict[str, str]) -> None:
    """This test must be in this file: the tests above make the rows of docs/models.md."""
    if len(rows) < len(CATALOGUE):
        pytest.skip("only a part of the zoo has run")
    made = table.render([rows[configuration.id] for configuration in CATALOGUE])
    assert table.PATH.read_text() == made, "run python -m tests.engine.zoo.table"
