"""`fairlead chat MODEL`: talk to a language model in the terminal."""

import http.client
import os
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.markup import escape

from fairlead.cli.models import shown_key
from fairlead.core.errors import FairleadError, Unavailable
from fairlead.core.generation import Chat, Delta, Generate, Message, Sampling, ToolCall, Usage, add_calls
from fairlead.core.specs import LlmSpec

HELP = """Talk to a language model.

MODEL is the name of a model that a running server has, or a checkpoint's folder, which is then computed right here.
A server that wants a key takes it from FAIRLEAD_API_KEY.
In the conversation: /reset forgets it, /system TEXT sets the system message, /exit or Ctrl-D leaves, Ctrl-C stops an answer.
"""
TIMEOUT_SECONDS = 300.0
STOPPED_EXIT = 130
"""As shells have it for Ctrl-C."""
NOT_SHOWN = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Control characters: what a model writes must not steer the terminal."""

Talk = Callable[[list[dict[str, str]]], Iterator[Delta]]
"""From the messages so far to the pieces of the answer; the last one tells what it used."""


@click.command(help=HELP)
@click.argument("model")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server's HTTP address.")
@click.option("--prompt", help="Ask this and leave.")
@click.option("--system", default="", help="The system message.")
@click.option("--temperature", type=click.FloatRange(0.0, 2.0), help="0: always the most likely token.  [default: the model's own]")
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--json", "as_json", is_flag=True, help="With --prompt: the answer and its numbers as JSON.")
def chat(
    model: str,
    url: str,
    prompt: str | None,
    system: str,
    temperature: float | None,
    max_tokens: int | None,
    seed: int | None,
    as_json: bool,
) -> None:
    if as_json and prompt is None:
        raise click.UsageError("--json needs --prompt")
    given = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    options = {name: value for name, value in given.items() if value is not None}
    talk = _here(Path(model), options) if Path(model).is_dir() else _served(url, model, options)
    messages = [{"role": "system", "content": system}] if system else []
    if prompt is not None:
        answer = _answer(talk, [*messages, {"role": "user", "content": prompt}], quiet=as_json)
        if as_json:
            click.echo(msgspec.json.encode(answer).decode())
        if answer["stopped"]:
            raise SystemExit(STOPPED_EXIT)
        return
    _converse(talk, messages, model)


def _converse(talk: Talk, messages: list[dict[str, str]], model: str) -> None:
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  # what makes input() know the arrow keys

    console = Console(highlight=False)
    console.print(f"[dim]{escape(model)}. /reset, /system TEXT, /exit; Ctrl-C stops an answer.[/]")
    while True:
        try:
            line = console.input("[bold]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line == "/exit":
            return
        if line == "/reset":
            messages[:] = [message for message in messages if message["role"] == "system"]
            console.print("[dim]forgotten[/]")
        elif line.split()[:1] == ["/system"]:
            text = line.removeprefix("/system").strip()
            messages[:] = [{"role": "system", "content": text}] * bool(text)
            console.print("[dim]a new conversation[/]")
        elif line.startswith("/"):
            console.print("[red]unknown command[/]: /reset, /system TEXT, /exit")
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                answer = _answer(talk, messages)
            except FairleadError as error:
                messages.pop()
                console.print(f"[red]{escape(error.message)}[/]")
            else:
                messages.append({"role": "assistant", "content": answer["content"]})


def _answer(talk: Talk, messages: list[dict[str, str]], *, quiet: bool = False) -> dict[str, Any]:
    """Print one answer as it comes, reasoning and calls of tools dimmed. Returns its text and numbers."""
    started = time.perf_counter()
    first = 0.0
    stopped = False
    whole, usage = Delta(), Usage()
    pieces = talk(messages)
    try:
        for piece in pieces:
            usage = piece.usage or usage
            if not (piece.text or piece.reasoning or piece.tool_calls):
                continue
            first = first or time.perf_counter()
            if not quiet:
                _show(whole, piece)
            whole.text += piece.text
            whole.reasoning += piece.reasoning
            add_calls(whole.tool_calls, piece.tool_calls)
    except KeyboardInterrupt:
        stopped = True
        if not quiet:
            click.echo(" ...", nl=False)
    finally:
        pieces.close()  # type: ignore[attr-defined]
    now = time.perf_counter()
    numbers: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "tokens": usage.completion_tokens,
    }
    numbers["first_token_seconds"] = round((first or now) - started, 4)
    if usage.completion_tokens > 1 and first:
        numbers["tokens_per_second"] = round((usage.completion_tokens - 1) / max(now - first, 1e-9), 1)
    if not quiet:
        click.echo()
        if sys.stdout.isatty():
            rate = f", {numbers['tokens_per_second']:.0f} tokens/s" if "tokens_per_second" in numbers else ""
            Console(highlight=False).print(
                f"[dim]{usage.completion_tokens} tokens, first after {1000 * numbers['first_token_seconds']:.0f} ms{rate}[/]"
            )
    said: dict[str, Any] = {"content": whole.text}
    if whole.reasoning:
        said["reasoning"] = whole.reasoning
    if whole.tool_calls:
        said["tool_calls"] = [{"name": call.name, "arguments": call.arguments} for call in whole.tool_calls]
    return {**said, "stopped": stopped, **numbers}


def _show(before: Delta, piece: Delta) -> None:
    """`before`: what of the answer is shown already."""
    if piece.reasoning:
        _print(piece.reasoning, dim=True)
    if piece.text:
        _print("\n\n" * bool((before.reasoning or piece.reasoning) and not before.text) + piece.text)
    known = {call.index for call in before.tool_calls}
    for call in piece.tool_calls:
        if call.index not in known:
            known.add(call.index)
            _print(f"\n{call.name} ", dim=True)
        _print(call.arguments, dim=True)
    sys.stdout.flush()


def _print(text: str, *, dim: bool = False) -> None:
    shown = text.translate(NOT_SHOWN)
    click.echo(click.style(shown, dim=True) if dim and shown else shown, nl=False)


def _served(url: str, model: str, options: dict[str, Any]) -> Talk:
    """Ask a server, as any client would."""
    scheme, host, port, path = _parted(url)
    connect = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection

    def talk(messages: list[dict[str, str]]) -> Iterator[Delta]:
        headers = {"content-type": "application/json", **shown_key()}
        body = {"model": model, "messages": messages, "stream": True, "stream_options": {"include_usage": True}, **options}
        # closing the connection in the middle is what tells the server to stop
        with closing(connect(host, port, timeout=TIMEOUT_SECONDS)) as connection:
            try:
                connection.request("POST", f"{path}/v1/chat/completions", msgspec.json.encode(body), headers)
                with connection.getresponse() as response:
                    if response.status != 200:
                        raise FairleadError(_message(response.read(), f"{response.status} {response.reason}"))
                    yield from _streamed(response)
            except TimeoutError:
                raise Unavailable(f"no answer from {url} within {TIMEOUT_SECONDS:g} s") from None
            except OSError as error:
                raise Unavailable(f"no answer from {url}: {error.strerror or error}. Is `fairlead serve` running there?") from None
            except http.client.HTTPException as error:
                raise Unavailable(f"{url} broke off its answer ({type(error).__name__})") from None

    return talk


def _parted(url: str) -> tuple[str, str, int | None, str]:
    """(scheme, host, port, path). An OpenAI client's base URL does as well: `/v1` at its end is left out. Raises FairleadError."""
    try:
        parsed = urllib.parse.urlsplit(url)
        port = parsed.port
    except ValueError:
        parsed, port = urllib.parse.urlsplit(""), None
    if parsed.scheme not in ("http", "https") or not parsed.hostname:
        raise FairleadError(f"--url must look like http://127.0.0.1:8000, not {url!r}")
    return parsed.scheme, parsed.hostname, port, parsed.path.rstrip("/").removesuffix("/v1")


def _streamed(lines: Iterable[bytes]) -> Iterator[Delta]:
    for line in lines:
        if line.startswith(b"data: [DONE]"):
            return
        if line.startswith(b"data: "):
            yield from _pieces(msgspec.json.decode(line.removeprefix(b"data: ")))
    raise Unavailable("the server broke off its answer")


def _pieces(chunk: dict[str, Any]) -> Iterator[Delta]:
    if "error" in chunk:
        raise FairleadError(chunk["error"]["message"])
    for choice in chunk["choices"]:
        told = choice["delta"]
        reasoning = told.get("reasoning_content") or told.get("reasoning") or ""
        yield Delta(text=told.get("content") or "", reasoning=reasoning, tool_calls=[_call(each) for each in told.get("tool_calls") or ()])
    if usage := chunk.get("usage"):
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        told = Usage(prompt_tokens=usage["prompt_tokens"], completion_tokens=usage["completion_tokens"], cached_tokens=cached)
        yield Delta(usage=told)


def _call(piece: dict[str, Any]) -> ToolCall:
    function = piece.get("function") or {}
    return ToolCall(index=piece["index"], name=function.get("name") or "", arguments=function.get("arguments") or "")


def _message(body: bytes, otherwise: str) -> str:
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return otherwise


def _here(folder: Path, options: dict[str, Any]) -> Talk:
    """Compute in this process."""
    import logging

    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with Console(stderr=True).status(f"loading {folder}"):
        from fairlead.llm.build import build_generator

        engine, tokenizer, _ = build_generator(folder, LlmSpec(), threads=len(os.sched_getaffinity(0)))

    def talk(messages: list[dict[str, str]]) -> Iterator[Delta]:
        prompt = Chat(messages=[Message(role=each["role"], content=each["content"]) for each in messages])
        rendered = tokenizer.render(prompt)
        parsing, _ = engine.answers.read(Generate(chat=prompt, parsed=True), rendered)
        engine.add(0, tokenizer.encode(rendered, add_special_tokens=False), Sampling(**options), parsing=parsing)
        try:
            while engine.has_work:
                for _, answer in engine.step():
                    if isinstance(answer, FairleadError):
                        raise answer
                    yield answer
        finally:
            engine.abort(0)

    return talk
