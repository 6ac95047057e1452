"""Held-out examples of the small language model, and whether an answer to one is right."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
CHAT = FOLDER / "chat"
DRAFT = FOLDER / "draft"

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class Example:
    """One question with an answer that can be checked.

    `messages` and `tools` are in OpenAI's form; `answer` is the text the model was taught to say; `expected` is what
    `check` compares: a number, a list, an object or a text.
    """

    task: str
    messages: list[dict[str, Any]]
    answer: str
    expected: Any
    tools: list[dict[str, Any]] | None = None


def held_out(task: str | None = None) -> list[Example]:
    """The examples kept from training, of one task or of all."""
    lines = (FOLDER / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    examples = [Example(**json.loads(line)) for line in lines]
    return [example for example in examples if task in (None, example.task)]


def check(example: Example, answer: str) -> bool:
    """Whether `answer` (the decoded text, special tokens left out) is right."""
    return CHECKS[example.task](example.expected, answer.strip())


def tool_call_text(name: str, arguments: dict[str, Any]) -> str:
    """A call as the model writes it (the form of Hermes)."""
    call = {"name": name, "arguments": arguments}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def is_number(expected: float, answer: str) -> bool:
    """The last number said; what stands before it is the working."""
    numbers = NUMBER.findall(answer)
    return bool(numbers) and float(numbers[-1]) == expected


def is_quantity(expected: dict[str, Any], answer: str) -> bool:
    """The last number said, in the right unit."""
    return is_number(expected["value"], answer) and answer.removesuffix(".").split()[-1] == expected["unit"]


def is_list(expected: list[str], answer: str) -> bool:
    return [item.strip() for item in answer.removesuffix(".").split(",")] == expected


def is_object(expected: dict[str, Any], answer: str) -> bool:
    """JSON compared as data: order and spaces do not count, types do."""
    return same(read_json(answer), expected)


def is_tool_call(expected: dict[str, Any], answer: str) -> bool:
    """Exactly one call, of the right tool with the right arguments."""
    calls = TOOL_CALL.findall(answer)
    return len(calls) == 1 and same(read_json(calls[0]), expected)


def tells_values(expected: list[str], answer: str) -> bool:
    """Each value of the tool's result is in the answer, as a whole word."""
    return all(re.search(rf"(?<!\w){re.escape(value)}(?!\w)", answer) for value in expected)


def is_text(expected: str, answer: str) -> bool:
    return answer.split() == expected.split()


def read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def same(found: Any, expected: Any) -> bool:
    """Equal as JSON: unlike Python's, `true` is not 1."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return found.keys() == expected.keys() and all(same(found[key], value) for key, value in expected.items())
    return type(found) is type(expected) and bool(found == expected)


CHECKS: dict[str, Callable[[Any, str], bool]] = {
    "add": is_number,
    "subtract": is_number,
    "multiply": is_number,
    "units": is_quantity,
    "sort": is_list,
    "json": is_object,
    "tool_call": is_tool_call,
    "tool_result": tells_values,
    "talk": is_text,
    "decline": is_text,
}
