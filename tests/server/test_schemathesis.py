"""Requests made up from the server's own description: whatever comes, no 5xx."""

from typing import Any

import pytest

from tests.server.serving import Running

# not ours: what the package and its dependencies warn of
pytestmark = pytest.mark.filterwarnings("ignore")

_EXAMPLES = 15  # an operation


def test_no_request_makes_it_fail(server: Running) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 12

    seen: dict[int, int] = {}
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=_EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def call(case: Any) -> None:
            response = case.call(timeout=30)
            assert response.status_code < 500, response.content
            seen[response.status_code] = seen.get(response.status_code, 0) + 1

        call()
    assert seen.get(200), "something must have been right"
    assert server.get("/health").status == 200
