"""Which error of ours is which of OpenAI's."""

import json

import pytest

from fairlead.api.openai.errors import BadParameter, OpenAIErrors
from fairlead.core import errors

ERRORS = OpenAIErrors("messages")


def told(error: errors.FairleadError) -> tuple[int, str, str | None, str | None]:
    """(status, type, param, code)."""
    answer = ERRORS.response(error, {})
    body = json.loads(answer.body)["error"]
    assert body["message"] == error.message
    assert json.loads(ERRORS.event(error)) == {"error": body}
    return answer.status_code, body["type"], body["param"], body["code"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (BadParameter("no", "top_p", "invalid_value"), (400, "invalid_request_error", "top_p", "invalid_value")),
        (errors.InvalidRequest("this model has no chat template"), (400, "invalid_request_error", "messages", None)),
        (errors.InvalidRequest("`logit_bias` holds token ids"), (400, "invalid_request_error", "logit_bias", None)),
        (errors.ContextExceeded("too long"), (400, "invalid_request_error", "messages", "context_length_exceeded")),
        (errors.TooLarge("too large"), (413, "invalid_request_error", None, "request_too_large")),
        (errors.NotFound("no such model"), (404, "invalid_request_error", "model", "model_not_found")),
        (errors.Unsupported("this model embeds"), (400, "invalid_request_error", "model", "unsupported_model")),
        (errors.QueueFull("full"), (429, "rate_limit_error", None, "queue_full")),
        (errors.TimeoutExpired("late"), (503, "server_error", None, "queue_timeout")),
        (errors.ShuttingDown("draining"), (503, "server_error", None, "unavailable")),
        (errors.Unavailable("loading"), (503, "server_error", None, "unavailable")),
        (errors.ModelError("failed"), (500, "server_error", None, "model_error")),
        (errors.ReplicaDied("died"), (500, "server_error", None, "model_error")),
        (errors.FairleadError("a new kind"), (500, "server_error", None, None)),
    ],
)
def test_every_error_has_its_status_type_param_and_code(error, expected):
    assert told(error) == expected


def test_what_is_worth_a_retry_says_when():
    full = errors.QueueFull("full")
    full.retry_after = 2.3
    assert ERRORS.response(full, {"x-request-id": "a"}).headers["retry-after"] == "3"
    assert "retry-after" not in ERRORS.response(errors.ModelError("failed"), {}).headers


def test_headers_of_the_answer_stay():
    assert ERRORS.response(errors.NotFound("no"), {"x-request-id": "a"}).headers["x-request-id"] == "a"
