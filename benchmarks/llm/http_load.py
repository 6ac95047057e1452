"""Chats from a number of clients at once against a server of the OpenAI protocol, streamed: tokens a second, times to the first and
between tokens. A bare HTTP client, because it shares the machine with the server; what came is read after the clock has stopped.
"""

import asyncio
import contextlib
import json
import random
import sysconfig
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

PROMPT_TOKENS = 126
NUM_FILES = 40
ANSWER_SECONDS = 600


class Answer(NamedTuple):
    asked: float
    events: list[tuple[float, bytes]]
    """When each piece came, and the bytes of it."""


class Load(NamedTuple):
    clients: int = 8
    requests: int = 24
    output: int = 64


class Server(NamedTuple):
    port: int
    model: str
    """The name it serves the model by."""
    fields: dict[str, object]
    """Of a request, beside the common ones."""


class Refused(RuntimeError):
    """The server will never answer this request."""


def texts(model: Path, count: int, seed: int) -> list[str]:
    """Pieces of the standard library's source, other ones with every seed."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    draw = random.Random(seed)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    source = "".join(path.read_text(encoding="ascii", errors="ignore") for path in draw.sample(files, NUM_FILES))
    ids = tokenizer.encode(source).ids
    starts = draw.sample(range(0, len(ids) - PROMPT_TOKENS, PROMPT_TOKENS), count)
    return [tokenizer.decode(ids[start : start + PROMPT_TOKENS]) for start in starts]


async def chat(server: Server, text: str, output: int, *, timeout: float = ANSWER_SECONDS) -> Answer:
    """Raises Refused, or OSError or RuntimeError where the server does not answer with a stream."""
    request = {
        "model": server.model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": output,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body = json.dumps(request | server.fields).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    asked = time.perf_counter()
    async with asyncio.timeout(timeout):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        with contextlib.closing(writer):
            writer.write(head.encode() + body)
            answered = await reader.readuntil(b"\r\n\r\n")
            status = int(answered.split(b" ", 2)[1])
            if status != 200 or b"chunked" not in answered.lower():
                raise (Refused if status in (400, 422) else RuntimeError)((answered + await reader.read(600)).decode(errors="replace"))
            events = []
            while size := int(await reader.readuntil(b"\r\n"), 16):
                piece = (await reader.readexactly(size + 2))[:-2]
                events.append((time.perf_counter(), piece))
            return Answer(asked, events)


async def load(server: Server, model: Path, seed: int, shape: Load) -> dict[str, float]:
    waiting = texts(model, shape.requests, seed)
    answers: list[Answer] = []

    async def client() -> None:
        while waiting:
            answers.append(await chat(server, waiting.pop(), shape.output))

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(shape.clients):
            group.create_task(client())
    return summary(answers, time.perf_counter() - began)


def summary(answers: list[Answer], seconds: float) -> dict[str, float]:
    """Tokens are counted by the server's usage. Several may arrive at once: the time of one is a stream's, by its tokens."""
    first, each, gaps, num_tokens = [], [], [], 0
    for answer in answers:
        tokens, stamps = read(answer)
        num_tokens += tokens
        if not stamps:  # special tokens alone, which random weights choose too, have no text
            continue
        first.append(stamps[0] - answer.asked)
        each.append((stamps[-1] - stamps[0]) / max(1, tokens - 1))
        gaps += [later - earlier for earlier, later in pairwise(stamps)]
    return {
        "tok_s": num_tokens / seconds,
        "tokens": num_tokens / len(answers),
        "ttft_p50_ms": percentile(first, 0.5) * 1e3,
        "ttft_p99_ms": percentile(first, 0.99) * 1e3,
        "itl_p50_ms": percentile(each, 0.5) * 1e3,
        "itl_p99_ms": percentile(gaps, 0.99) * 1e3,
    }


def read(answer: Answer) -> tuple[int, list[float]]:
    """(completion tokens, when text came). A server's chunks may cut its events anywhere."""
    tokens, stamps, rest = 0, [], b""
    for stamp, piece in answer.events:
        *lines, rest = (rest + piece).split(b"\n")
        told = [json.loads(line[5:]) for line in lines if line.startswith(b"data:") and b"[DONE]" not in line]
        for event in told:
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            tokens = (event.get("usage") or {}).get("completion_tokens") or tokens
        if any((choice.get("delta") or {}).get("content") for event in told for choice in event.get("choices") or ()):
            stamps.append(stamp)
    return tokens or len(stamps), stamps


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")
