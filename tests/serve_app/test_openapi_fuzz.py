"""Requests drawn from /openapi.json, legal and not: no 5xx, and answers are as documented."""

import httpx
import pytest
import schemathesis
from http_service import in_a_thread, resolved
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
]
LEGAL, ILLEGAL = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
VIDEO = "/v1/videos/{video_id}"
OPERATIONS = [
    ("get", "/health"),
    ("get", "/ready"),
    ("get", "/v1/cinematography"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{model}"),
    ("get", "/v1/videos"),
    ("post", "/v1/videos"),
    ("post", "/v1/images/generations"),
    ("get", VIDEO),
    ("post", VIDEO + "/remix"),
    ("get", VIDEO + "/content"),
    ("head", VIDEO + "/content"),
    ("get", VIDEO + "/events"),
    ("delete", VIDEO),
]
CASES = [(*operation, LEGAL) for operation in OPERATIONS] + [
    # The others have nothing to be illegal with: any text is a path's part.
    ("get", "/v1/videos", ILLEGAL),
    ("post", "/v1/videos", ILLEGAL),
    ("post", "/v1/images/generations", ILLEGAL),
    ("get", VIDEO + "/content", ILLEGAL),
]


@pytest.fixture(scope="module")
def service_url(tmp_path_factory):
    """The service in a thread of its own: schemathesis asks from this one. A short queue, so that
    429 is met too; the worker makes some of the videos."""
    options = resolved(jobs={"max_queued_jobs": 20})
    with in_a_thread(tmp_path_factory.mktemp("fuzz"), options, step_s=0.001) as url:
        yield url


@pytest.fixture(scope="module")
def api(service_url):
    return schemathesis.openapi.from_url(f"{service_url}/openapi.json")


@pytest.fixture
def video_ids(service_url):
    """Two videos that exist: random text never names one."""
    body = {"prompt": "a cat", "num_inference_steps": 2, "num_frames": 5}
    answers = [httpx.post(f"{service_url}/v1/videos", json=body) for _ in range(2)]
    return [answer.json()["id"] for answer in answers if answer.status_code == 200]


def test_every_operation_is_documented(api):
    documented = [operation.ok() for operation in api.get_all_operations()]
    assert sorted((o.method, o.path) for o in documented) == sorted(OPERATIONS)


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_answers_are_as_documented(api, video_ids, method, path, mode):
    drawn_ids = st.sampled_from([*video_ids, None])

    @settings(
        max_examples=40 if method == "post" else 15,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=api[path][method].as_strategy(generation_mode=mode), video_id=drawn_ids)
    def ask(case, video_id):
        if video_id is not None and "video_id" in case.path_parameters:
            case.path_parameters["video_id"] = video_id
        case.call_and_validate(checks=CHECKS, timeout=30)

    ask()
