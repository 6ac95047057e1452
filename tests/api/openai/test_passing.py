"""What is read of a body that goes on to another server."""

from typing import Any

import msgspec
import pytest

from fairlead.api.openai.errors import BadParameter
from fairlead.api.openai.passing import peek, raw_of
from fairlead.core.request import Raw


def read(path: str = "/v1/completions", **fields: Any) -> Raw:
    body = msgspec.json.encode({"model": "m", **fields})
    return raw_of(peek(body), path, body, "")


@pytest.mark.parametrize(
    ("fields", "num_choices"),
    [
        ({"prompt": "one"}, 1),
        ({"prompt": ["one", "two", "three"]}, 3),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1, 2], [3]]}, 2),
        ({"prompt": ["one", [3]], "n": 4}, 8),
        ({"prompt": "one", "n": 2, "best_of": 5}, 5),
        ({"prompt": []}, 1),
    ],
)
def test_every_answer_that_will_be_generated_is_held(fields: dict[str, Any], num_choices: int) -> None:
    assert read(**fields, max_tokens=400).num_choices == num_choices


def test_the_larger_of_two_bounds_counts_and_embeddings_generate_nothing() -> None:
    assert read("/v1/chat/completions", messages=[], max_tokens=3, max_completion_tokens=9).max_tokens == 9
    assert read("/v1/embeddings", input="x").max_tokens == 0


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n", "best_of", "priority"])
def test_numbers_below_zero_are_refused_by_name(name: str) -> None:
    with pytest.raises(BadParameter, match=f"Invalid value for '{name}'"):
        read(prompt="x", **{name: -1})
