"""kill -9 at random instants: nothing is broken, nothing is lost, and little is done twice."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.instants import kills, seeded
from tests.faults.killed import COMMANDS, Command, Ended, Place, died, prepared, unchanged

pytestmark = pytest.mark.long

FEW = 3


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command(name: str, tmp_path: Path) -> None:
    _kill(COMMANDS[name](), tmp_path / "place", FEW)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_many_times(name: str, tmp_path: Path) -> None:
    _kill(COMMANDS[name](), tmp_path / "place", kills())


def _kill(command: Command, root: Path, times: int) -> None:
    """Kill the command `times` times: by turns before a system call and at a time."""
    with seeded() as chance, prepared(command, root) as place:
        with unchanged(place):
            whole = place.run(*command.arguments(place))
            assert whole.code == 0, whole.out
        killed = 0
        for number in range(times):
            with unchanged(place):
                killed += _kill_once(command, place, chance, by_call=number % 2 == 0, whole=whole)
        assert killed >= times // 3, f"of {times} kills {killed} came in time"


def _kill_once(
    command: Command, place: Place, chance: random.Random, *, by_call: bool, whole: Ended
) -> bool:
    arguments = command.arguments(place)
    if by_call:
        where = {"last": chance.randint(1, whole.calls)}
        first = place.run(*arguments, last=where["last"])
    else:
        where = {"seconds": chance.uniform(0, whole.seconds)}
        first = place.run(*arguments, seconds=where["seconds"])
    try:
        command.check_killed(place)
        again = place.run(*arguments)
        assert again.code == 0, again.out
        command.check_done(place)
    except BaseException as error:
        error.add_note(f"killed at {where}, of {whole.calls} calls in {whole.seconds:.3f} s")
        raise
    return died(first)
