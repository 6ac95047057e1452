"""A small upstream for tests and benchmarks: OpenAI's protocol and KServe v2 over real sockets, with answers, a pace and faults as told.

python -m fairlead.runtime.upstream.fake --port 9000 --script '{"pace": 0.02}'     PUT /script changes it while it runs
"""

import argparse
import asyncio
import math
import os
import signal
import ssl
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import httptools
import msgspec
from msgspec import Raw, Struct

MAX_RECEIVED = 256
WORDS = ("fairleads ", "guide ", "mooring ", "hawsers ", "smoothly ", "around ", "corners ", "without ", "chafing ", "anything ")
"""Of answers, again and again: some gateways take one word a hundred times for a broken model."""

Fault = Literal[
    "",
    "status",
    "hang",
    "reset",
    "stale",
    "cut",
    "garbage",
    "redirect",
    "excess",
    "text",
    "stall",
    "die",
    "whole",
    "twice",
    "endless",
    "headers",
]
"""What goes wrong instead of an answer.

status    answer with `status`
hang      never answer
reset     close without an answer
stale     the same, only on connections that were used before
cut       close in the middle: of a stream after `after` chunks, of another answer after half of it
garbage   answer with something that is not HTTP
redirect  point somewhere else
excess    answer twice
text      answer with a text that is no JSON
stall     say nothing more in the middle of a stream, after `after` chunks
die       the same, by the process's end
whole     answer a stream in one piece
twice     end a stream with [DONE] twice
endless   answer with one event of 100 MiB
headers   answer with headers of 1 MiB
"""
ENDLESS_BYTES = 100 << 20
HEADERS_BYTES = 1 << 20
PIECE_BYTES = 64 << 10
Start = Literal["", "hang", "die", "garbage", "once"]
"""How the program starts, in place of serving.

hang      never listen
die       print something, and end
garbage   listen, and answer with something that is not HTTP
once      serve; started again beside the file that it left behind, die
"""


class Script(Struct, kw_only=True, forbid_unknown_fields=True):
    """How to answer."""

    chunks: int = 64
    """Words of an answer; one event each in a stream."""
    pace: float = 0.0
    """Seconds between two events."""
    first_byte: float = 0.0
    """Seconds before the answer."""
    usage: bool = True
    """Tell what was used; else `stream_options` means nothing to it either."""
    fault: Fault = ""
    times: int = -1
    """How many requests meet the fault; -1: all."""
    status: int = 500
    retry_after: str = ""
    after: int = 3
    http_1_0: bool = False
    """Answer without a length, and close."""
    newline: Literal["\n", "\r\n"] = "\n"
    """Of events."""
    models: tuple[str, ...] = ("fake",)
    """What it says it has; () for a server that does not say."""
    key: str = ""
    """Without which it answers nothing."""
    health: int = 200
    split: int = 0
    """Events are written in pieces of so many bytes; 0: each at once."""


class Received(Struct):
    method: str
    target: str
    headers: dict[str, str]
    body: bytes


class _StreamOptions(Struct):
    include_usage: bool = False


class _Ask(Struct):
    """What the answer depends on."""

    model: str
    messages: Raw = Raw(b"null")
    prompt: Raw = Raw(b"null")
    input: Raw = Raw(b"null")
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


_ask = msgspec.json.Decoder(_Ask)
_script = msgspec.json.Decoder(Script)
_encode = msgspec.json.Encoder().encode
REASONS = {200: "OK", 307: "Temporary Redirect", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests"}


class Fake:
    """The server. `script` may be replaced at any time; what came is in `received`."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self.received: deque[Received] = deque(maxlen=MAX_RECEIVED)
        self.num_requests = 0
        self.num_connections = 0
        """Ever made."""
        self.num_open = 0
        """Answers under way."""
        self.num_left = 0
        """Of these, those whose client went away."""
        self.connections: set[_Connection] = set()
        self.port = 0
        self._server: asyncio.Server | None = None
        self._scheme = "http"
        self._changed = asyncio.Event()

    @property
    def url(self) -> str:
        return f"{self._scheme}://localhost:{self.port}" if self._scheme == "https" else f"http://127.0.0.1:{self.port}"

    async def start(self, port: int = 0, tls: ssl.SSLContext | None = None) -> "Fake":
        self._scheme = "https" if tls is not None else "http"
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", port, ssl=tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for connection in list(self.connections):
            connection.transport.abort()
        await self._server.wait_closed()
        await self.until(lambda: not self.connections)

    async def until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        """Wait for something to have happened here."""
        async with asyncio.timeout(seconds):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def changed(self) -> None:
        self._changed.set()

    def fault(self, connection: "_Connection") -> Fault:
        """What this request meets."""
        script = self.script
        if not script.fault or not script.times or (script.fault == "stale" and connection.num_requests < 2):
            return ""
        script.times -= script.times > 0
        return script.fault


class _Connection(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self, fake: Fake) -> None:
        self.fake = fake
        self.parser = httptools.HttpRequestParser(self)
        self.num_requests = 0
        self.target = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.writing: _Stream | None = None
        self.waiting: asyncio.TimerHandle | None = None
        self.hanging = False
        self.breaking: Fault = ""
        """How the answer under way breaks off."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.fake.connections.add(self)
        self.fake.num_connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        fake = self.fake
        fake.connections.discard(self)
        if self.waiting is not None:
            self.waiting.cancel()
        if self.writing is not None:
            self.writing.stop()
        if self.writing is not None or self.waiting is not None or self.hanging:
            fake.num_left += 1
            fake.num_open -= 1
        fake.changed()

    def pause_writing(self) -> None:
        if self.writing is not None:
            self.writing.paused = True

    def resume_writing(self) -> None:
        if self.writing is not None:
            self.writing.paused = False
            self.writing.next()

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.transport.abort()

    def on_message_begin(self) -> None:
        self.target = b""
        self.headers = []
        self.body = b""

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_body(self, body: bytes) -> None:
        self.body = self.body + body if self.body else body

    def on_message_complete(self) -> None:
        fake = self.fake
        self.breaking = ""
        self.num_requests += 1
        fake.num_requests += 1
        fake.num_open += 1
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in self.headers}
        method, target = self.parser.get_method().decode(), self.target.decode("latin-1")
        fake.received.append(Received(method, target, headers, self.body))
        fake.changed()
        if fake.script.first_byte and method == "POST":
            self.waiting = asyncio.get_running_loop().call_later(fake.script.first_byte, self._answer, method, target, headers)
        else:
            self._answer(method, target, headers)

    # Answers

    def _answer(self, method: str, target: str, headers: dict[str, str]) -> None:
        self.waiting = None
        script = self.fake.script
        if script.key and target != "/health" and headers.get("authorization") != f"Bearer {script.key}":
            self.write(401, _error(401, "no such key"))
            return
        if method == "POST" and (fault := self.fake.fault(self)) and not self._goes_wrong(fault):
            return
        try:
            if target == "/script":
                self.fake.script = _script.decode(self.body)
                self.write(200, b"{}")
            elif target.startswith("/v2/"):
                self._kserve(method, target.removeprefix("/v2/"), headers)
            elif target == "/v1/embeddings":
                self._embed(_ask.decode(self.body))
            elif target in ("/v1/chat/completions", "/v1/completions"):
                self._generate(_ask.decode(self.body), chat="chat" in target)
            elif target == "/v1/models":
                listed = [{"id": name, "object": "model", "created": 1, "owned_by": "fake"} for name in script.models]
                self.write(*((200, _encode({"object": "list", "data": listed})) if listed else (404, _error(404, "no such path"))))
            elif target == "/health":
                self.write(script.health, b"{}")
            else:
                self.write(404, _error(404, f"no such path: {target}"))
        except (msgspec.DecodeError, KeyError, ValueError) as error:
            self.write(400, _error(400, str(error)))

    def _goes_wrong(self, fault: Fault) -> bool:
        """Whether an answer is still to be given."""
        script = self.fake.script
        if fault == "status":
            extra = f"retry-after: {script.retry_after}\r\n" if script.retry_after else ""
            self.write(script.status, _error(script.status, f"told to answer {script.status}"), extra)
        elif fault == "redirect":
            self.write(307, b"", "location: http://127.0.0.1:1/\r\n")
        elif fault == "hang":
            self.hanging = True
        elif fault == "garbage":
            self.transport.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
            self._ended()
        elif fault == "excess":
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n" * 2)
            self._ended()
        elif fault == "text":
            self.write(200, b"<html>It works!</html>")
        elif fault == "headers":
            self.write(200, b"{}", "x-padding: 0123456789\r\n" * (HEADERS_BYTES // 23))
        elif fault in ("cut", "stall", "die", "whole", "twice", "endless"):
            self.breaking = fault
            return True
        else:
            self._ended()
            self.transport.abort()
        return False

    def _generate(self, ask: _Ask, *, chat: bool) -> None:
        script = self.fake.script
        asked = ask.max_completion_tokens or ask.max_tokens
        num_words = script.chunks if asked is None else min(script.chunks, asked)
        reason = "stop" if num_words == script.chunks else "length"
        usage = _usage(math.ceil(len(bytes(ask.messages if chat else ask.prompt)) / 4), num_words) if script.usage else None
        if ask.stream and self.breaking != "whole":
            include = script.usage and ask.stream_options is not None and ask.stream_options.include_usage
            events = _events(ask.model, num_words, reason, usage if include else None, chat=chat, newline=script.newline)
            if self.breaking == "twice":
                events += events[-1:]
            elif self.breaking == "endless":
                events = (b"data: ",) + (b"x" * PIECE_BYTES,) * (ENDLESS_BYTES // PIECE_BYTES) + (script.newline.encode() * 2,)
            self.writing = _Stream(self, events)
            self.writing.start()
            return
        text = text_of(num_words)
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        answer: dict[str, Any] = {
            "id": f"chatcmpl-{self.fake.num_requests}",
            "object": "chat.completion" if chat else "text_completion",
            "created": 1,
            "model": ask.model,
            "choices": [choice],
        }
        if usage is not None:
            answer["usage"] = usage
        self.write(200, _encode(answer))

    def _embed(self, ask: _Ask) -> None:
        texts = msgspec.json.decode(ask.input)
        texts = texts if isinstance(texts, list) else [texts]
        data = [{"object": "embedding", "index": n, "embedding": [0.6, 0.8]} for n in range(len(texts))]
        answer: dict[str, Any] = {"object": "list", "data": data, "model": ask.model}
        if self.fake.script.usage:
            tokens = sum(map(len, map(str, texts))) // 4 + 1
            answer["usage"] = {"prompt_tokens": tokens, "total_tokens": tokens}
        self.write(200, _encode(answer))

    def _kserve(self, method: str, path: str, headers: dict[str, str]) -> None:
        """Every input comes back as an output of the same name."""
        if method != "POST":
            self.write(200, b'{"live":true,"ready":true}')
            return
        model = path.split("/")[1]
        length = headers.get("inference-header-content-length")
        asked = msgspec.json.decode(self.body[: int(length)] if length else self.body)
        answer = {"model_name": model, "model_version": "1", "outputs": asked["inputs"]}
        if "id" in asked:
            answer["id"] = asked["id"]
        head = _encode(answer)
        if length:
            kind = f"inference-header-content-length: {len(head)}\r\n"
            self.write(200, head + self.body[int(length) :], kind, "application/octet-stream")
        else:
            self.write(200, head)

    def write(self, status: int, body: bytes, extra: str = "", kind: str = "application/json") -> None:
        script = self.fake.script
        cut = self.breaking == "cut" and status == 200
        start = f"HTTP/1.1 {status} {REASONS.get(status, 'Whatever')}\r\ncontent-type: {kind}\r\n{extra}"
        if script.http_1_0:
            start = start.replace("1.1", "1.0", 1)
        else:
            start += f"content-length: {len(body)}\r\nx-upstream-secret: 1\r\n"
        self.transport.write(start.encode() + b"\r\n" + (body[: len(body) // 2] if cut else body))
        self._ended()
        if cut or script.http_1_0:
            self.transport.close()

    def _ended(self) -> None:
        self.fake.num_open -= 1
        self.fake.changed()

    def stream_ended(self) -> None:
        self.writing = None
        self._ended()


class _Stream:
    """An answer in events, at a pace."""

    def __init__(self, connection: _Connection, events: tuple[bytes, ...]) -> None:
        self.connection = connection
        self.events = events
        self.at = 0
        self.paused = False
        self.timer: asyncio.TimerHandle | None = None
        self.loop = asyncio.get_running_loop()
        self.due = self.loop.time()

    def start(self) -> None:
        self.connection.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n" + self._framed()
        )
        self.next()

    def next(self) -> None:
        """Whatever is due is written, one event at a time."""
        script = self.connection.fake.script
        while not self.paused and self.at < len(self.events):
            if self.timer is not None:
                return
            if script.pace:
                self.due += script.pace
                self.timer = self.loop.call_at(self.due, self._due)
                return
            self._write()
            if self.connection.writing is None:
                return
        if self.at == len(self.events) and not self.paused:
            self.connection.transport.write(b"0\r\n\r\n")
            self.connection.stream_ended()

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def _due(self) -> None:
        self.timer = None
        self._write()
        if self.connection.writing is self:
            self.next()

    def _write(self) -> None:
        connection = self.connection
        script = connection.fake.script
        if connection.breaking == "stall" and self.at >= script.after:
            self.at = len(self.events) + 1
            return
        if connection.breaking == "die" and self.at == script.after:
            os.kill(os.getpid(), signal.SIGKILL)
        if connection.breaking == "cut" and self.at == script.after:
            connection.transport.write(self._framed()[:-20])  # in the middle of an event
            connection.transport.close()
            connection.stream_ended()
            return
        connection.transport.write(self._framed())

    def _framed(self) -> bytes:
        event = self.events[self.at]
        self.at += 1
        split = self.connection.fake.script.split or len(event)
        pieces = (event[at : at + split] for at in range(0, len(event), split))
        return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


def _events(model: str, num_words: int, reason: str, usage: dict[str, int] | None, *, chat: bool, newline: str) -> tuple[bytes, ...]:
    """One for each word, and those around them, as OpenAI has them."""

    def event(choices: list[dict[str, Any]], told: dict[str, int] | None = None) -> bytes:
        fields: dict[str, Any] = {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": 1,
            "model": model,
            "system_fingerprint": "fp_44709d6fcb",
            "choices": choices,
        }
        if usage is not None:
            fields["usage"] = told
        return b"data: " + _encode(fields) + newline.encode() * 2

    def piece(text: str, finish: str | None) -> list[dict[str, Any]]:
        if chat:
            return [{"index": 0, "delta": {"content": text} if text else {}, "logprobs": None, "finish_reason": finish}]
        return [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish}]

    words = [event(piece(word, None)) for word in WORDS]
    events = [words[number % len(words)] for number in range(num_words)] + [event(piece("", reason))]
    if chat:
        events.insert(0, event([{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]))
    if usage is not None:
        events.append(event([], usage))
    return (*events, b"data: [DONE]" + newline.encode() * 2)


def text_of(num_words: int) -> str:
    """The answer of so many words."""
    return "".join(WORDS[number % len(WORDS)] for number in range(num_words))


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _error(status: int, message: str) -> bytes:
    return _encode({"error": {"message": message, "type": "fake", "param": None, "code": status}})


def _begin(start: str) -> str:
    """How it is to start, as far as that is not done here."""
    how, _, file = start.partition(":")
    if how == "once" and not Path(file).exists():
        Path(file).touch()
        return ""
    if how in ("die", "once"):
        print("reading the weights\nthe weights are broken: sk-abcdefghijklmnopqrst", flush=True)
        raise SystemExit(3)
    return how


async def _nonsense(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--start", default="", help=f"one of {', '.join(get_args(Start)[1:])}; `once:FILE`")
    parser.add_argument("--script", type=_script.decode, default=Script(), help='as JSON: {"pace": 0.02, "chunks": 64}')
    given = parser.parse_args()
    start = _begin(given.start)

    async def run() -> None:
        if start == "hang":
            print("reading the weights, for ever", flush=True)
            await asyncio.Event().wait()
        if start == "garbage":
            await (await asyncio.start_server(_nonsense, "127.0.0.1", given.port)).serve_forever()
        fake = await Fake(given.script).start(given.port)
        print(fake.url, flush=True)
        await asyncio.Event().wait()

    try:
        import uvloop
    except ImportError:  # Windows
        asyncio.run(run())
    else:
        uvloop.run(run())


if __name__ == "__main__":
    main()
