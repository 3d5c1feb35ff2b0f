"""What the OpenAPI document promises and forbids, by schemathesis: no server error in all of it.

`MODELPACK_FUZZ_EXAMPLES` is how many requests of each kind every operation gets.
"""

from __future__ import annotations

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from tests.engine.serving.load.served import Served, is_error

EXAMPLES = int(os.environ.get("MODELPACK_FUZZ_EXAMPLES", "2"))
#: By design: what the request takes is not there, now or here; the registry cannot be reached.
UNAVAILABLE = (501, 503, 529)
UNREACHABLE = b"no such host"
#: So many rules that few of what is made keeps them all: these get more, and are to be answered.
MAIN = ("POST /v1/chat/completions", "POST /v1/messages", "POST /api/chat")
#: Bodies that are files; `test_bodies` and the tests of archives send them.
FILES = ("POST /models/load",)


@pytest.mark.long
@pytest.mark.parametrize("served", [False], indirect=True, ids=["bare"])
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_no_server_error(
    served: Served, mode: schemathesis.GenerationMode, subtests: pytest.Subtests
) -> None:
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    statuses: dict[str, set[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.label in FILES:
            continue
        with subtests.test(operation=operation.label):
            seen = statuses.setdefault(operation.label, set())
            try:
                _ask(operation, mode, seen)
            except Unsatisfiable:  # a route without parameters has no invalid requests
                assert mode is schemathesis.GenerationMode.NEGATIVE
    assert len(statuses) > 30
    expected = 200 if mode is schemathesis.GenerationMode.POSITIVE else 400
    for label in MAIN:
        assert expected in statuses[label], label


def _ask(
    operation: schemathesis.APIOperation, mode: schemathesis.GenerationMode, seen: set[int]
) -> None:
    @settings(
        max_examples=EXAMPLES * (21 if operation.label in MAIN else 1),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "m"  # otherwise every response is "no such model"
        case.query.pop("follow", None)  # a followed log does not end
        response = case.call(timeout=20)
        status, content = response.status_code, response.content
        seen.add(status)
        about = f"{status} {content[:300]!r} to {case.as_curl_command()}"
        assert status < 500 or status in UNAVAILABLE or UNREACHABLE in content, about
        if status >= 400 and case.method != "HEAD":
            assert is_error(case.formatted_path, content), about

    ask()
