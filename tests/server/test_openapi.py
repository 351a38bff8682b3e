"""Whatever schemathesis makes of the OpenAPI document is answered as the document says: the real server, a mock engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from fastqwen.server.app import create_app
from tests.reliability.mock_model import make_model
from tests.reliability.server import Server, serving
from tests.server.harness import make_state

SCHEMA = schemathesis.openapi.from_dict(create_app(make_state())._app.openapi())
# A server that sleeps answers the other cases with nothing but that; tests/server/test_control.py has it.
OPERATIONS = {one.ok().label: one.ok() for one in SCHEMA.get_all_operations() if one.ok().path != "/sleep"}
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
# Beside what the document names: routes without any input have cases, too.
NAMES = [
    "Accept",
    "Content-Type",
    "Origin",
    "Range",
    "If-None-Match",
    "X-Api-Key",
    "X-Explain-Cache",
    "X-Request-Id",
    "Expect",
]
HEADERS = st.dictionaries(
    st.sampled_from(NAMES), st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40), max_size=3
)
QUERIES = st.dictionaries(st.sampled_from(["explain_cache", "q", "%00"]), st.text(max_size=20), max_size=2)
CASES = [pytest.param(20, id="x20"), pytest.param(120, id="x120", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = make_model(tmp_path_factory.mktemp("mock"))
    with serving(folder, step_s=0.0, access_log=False, engine={"max_model_len": 128}) as found:
        yield found


@pytest.mark.parametrize("count", CASES)
@pytest.mark.parametrize("label", OPERATIONS)
def test_every_case_is_answered_as_documented(server: Server, label: str, count: int):
    operation = OPERATIONS[label]
    seen: Counter[int] = Counter()
    good = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    bad = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)

    with requests.Session() as session:

        @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=good | bad, headers=HEADERS, params=QUERIES)
        def run(case: schemathesis.Case, headers: dict[str, str], params: dict[str, str]) -> None:
            response = case.call(base_url=server.url, session=session, headers=headers, params=params, timeout=20)
            seen[response.status_code] += 1
            case.validate_response(response, checks=CHECKS)

        run()
    print(label, dict(seen))
    assert sum(seen.values()) >= count * 0.9  # the same case is not made twice
