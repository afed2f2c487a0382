"""Requests made up from the server's own description: whatever comes, no 5xx."""

from collections import Counter
from typing import Any

import pytest

from tests.server.serving import Running

# not ours: what the package and its dependencies warn of
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "num_requests",
    [300, pytest.param(10_000, marks=pytest.mark.slow)],  # seven minutes beside others
)
def test_no_request_makes_it_fail(server: Running, num_requests: int) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 12

    varied = [operation for operation in operations if operation.body or operation.path_parameters]
    seen: Counter[int] = Counter()
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=num_requests // len(varied),
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def call(case: Any) -> None:
            response = case.call(timeout=30)
            assert response.status_code < 500, response.content
            seen[response.status_code] += 1

        call()
    assert seen[200], "something must have been right"
    assert seen.total() >= 0.9 * num_requests
    assert server.get("/health").status == 200
