"""What parsing costs an answer: microseconds of a token, ours and transformers' parser of the same templates, in turns.

    .venv/bin/python benchmarks/llm/parsing.py [--tokens 2000 20000 200000] [--rounds 5]

A token is a piece of four characters. `text` is prose without tools offered, `tools` the same with tools offered, `code` prose full of
the characters that anchors begin with, `thinking` reasoning, `call` one call whose arguments are as long as the answer.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator

from transformers.utils.chat_parsing import ResponseParser as Theirs

from fairlead.llm.parsing.choose import shipped
from fairlead.llm.parsing.parser import ResponseParser

TOOLS = {"write": {"type": "object", "properties": {"text": {"type": "string"}}}}
PROSE = "The harbour was quiet in the morning, and nobody asked for the time. "
CODE = "if (a < b) { return <b>a</b>; } // <tool of <think "


def pieces(text: str, num: int) -> list[str]:
    whole = text * (4 * num // len(text) + 1)
    return [whole[at : at + 4] for at in range(0, 4 * num, 4)]


def answers(num: int) -> Iterator[tuple[str, list[str], bool]]:
    """(name, pieces, whether tools are offered)."""
    yield "text", pieces(PROSE, num), False
    yield "tools", pieces(PROSE, num), True
    yield "code", pieces(CODE, num), True
    yield "thinking", ["<think>\n", *pieces(PROSE, num), "</think>", "\n\n", "So."], True
    body = json.dumps({"name": "write", "arguments": {"text": "".join(pieces(PROSE, num))}})
    yield "call", ["<tool_call>", *[body[at : at + 4] for at in range(0, len(body), 4)], "</tool_call>"], True


def seconds(push: Callable[[str], object], given: list[str]) -> float:
    started = time.perf_counter()
    for piece in given:
        push(piece)
    return time.perf_counter() - started


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("--tokens", type=int, nargs="+", default=[2000, 20000, 200000])
    asked.add_argument("--rounds", type=int, default=5)
    options = asked.parse_args()
    template, spec = shipped("hermes")
    theirs = json.loads(json.dumps(spec.response_template, default=lambda each: {k: getattr(each, k) for k in each.__struct_fields__}))
    theirs = {name: value for name, value in theirs.items() if value is not None}
    theirs["fields"] = {key: {k: v for k, v in each.items() if v is not None} for key, each in theirs["fields"].items()}
    print(f"{'answer':10} {'tokens':>8} {'ours, us':>9} {'theirs, us':>10} {'ratio':>6}")
    for num in options.tokens:
        for name, given, offered in answers(num):
            ours, others = [], []
            for _ in range(options.rounds if num < 100_000 else 1):
                ours.append(seconds(ResponseParser(template, tools=TOOLS if offered else {}).push, given))
                others.append(seconds(Theirs(theirs, prefix="").feed, given))
            mine, other = (statistics.median(each) / len(given) * 1e6 for each in (ours, others))
            print(f"{name:10} {num:8} {mine:9.2f} {other:10.2f} {other / mine:6.1f}")


if __name__ == "__main__":
    main()
