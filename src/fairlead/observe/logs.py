"""Structured logs: JSON lines for machines, colours on a terminal.

Every line has `time`, `level`, `event`, `room` and `pid`; secrets and people's texts are taken out of all of them.
"""

import io
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any, Literal, TextIO

import msgspec
import structlog

from fairlead.core.logs import Level
from fairlead.observe.log_levels import OURS, RoomLevels, number_of, room_of
from fairlead.observe.log_ring import LogRing
from fairlead.observe.redaction import plain_json, printable, redact_event, without_secrets

LogFormat = Literal["auto", "json", "console"]
Event = dict[str, Any]

LEVELS = {name.lower(): number for name, number in logging.getLevelNamesMapping().items()}
FIRST = ("time", "level", "event", "room", "pid")


class Out:
    """What structlog writes to for one room."""

    __slots__ = ("critical", "debug", "error", "info", "msg", "room", "warning")

    def __init__(self, room: str, write: Callable[[str], None]) -> None:
        self.room = room
        self.debug = self.info = self.warning = self.error = self.critical = self.msg = write


class _Handler(logging.Handler):
    """For the standard library's loggers."""

    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(self.format(record))
        except Exception:
            self.handleError(record)


class Journal:
    """Where the lines of this process go, and which of them."""

    def __init__(
        self,
        level: Level = "info",
        style: LogFormat = "auto",
        stream: TextIO | None = None,
        *,
        levels: Mapping[str, Level] | None = None,
        texts: bool = False,
    ) -> None:
        self.stream = stream or sys.stderr
        self.levels = RoomLevels(level, levels)
        self.ring = LogRing()
        self.texts = texts
        self.pretty = style == "console" or (style == "auto" and self.stream.isatty())
        self._mark = ""
        self._lock = Lock()
        self._outs: dict[str, Out] = {}
        self._classes: dict[str, Any] = {}
        self._exceptions = structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False))
        self._console = structlog.dev.ConsoleRenderer(colors=self.stream.isatty(), exception_formatter=_traceback)
        self._set_others: set[str] = set()

    def install(self) -> None:
        """For structlog, and for the standard library's loggers (uvicorn's, fsspec's)."""
        structlog.configure(
            processors=[structlog.contextvars.merge_contextvars, structlog.stdlib.add_log_level, self._line_of],
            wrapper_class=self._logger,  # type: ignore[arg-type]
            logger_factory=self._out,
            cache_logger_on_first_use=False,
        )
        handler = _Handler(self._write)
        handler.setFormatter(
            structlog.stdlib.ProcessorFormatter(processors=[self._line_of], foreign_pre_chain=[structlog.stdlib.add_log_level])
        )
        root = logging.getLogger()
        root.handlers[:] = [handler]
        root.setLevel(max(number_of(self.levels.default), logging.WARNING))
        self.levels_changed()

    def levels_changed(self) -> None:
        """What `levels` says holds from now on."""
        self._classes.clear()
        said = self.levels.said()
        for name in self._set_others - said.keys():
            logging.getLogger(name).setLevel(logging.NOTSET)
        for name in said.keys() - {OURS}:
            logging.getLogger(name).setLevel(number_of(said[name]))
        self._set_others = said.keys() - {OURS}

    def set_levels(self, said: Mapping[str, Level]) -> None:
        """Exactly these hold, as another process has decided."""
        self.levels.lasting, self.levels.passing = dict(said), {}
        self.levels_changed()

    def pass_on(self, event: Event) -> None:
        """A line of another process, which has all that a line has."""
        self._write(self._rendered(event))

    def to_machine(self, mark: str) -> None:
        """From now on another process reads the stream, and keeps the latest lines. It knows ours by a mark before them."""
        self.pretty, self._mark, self.ring = False, mark, LogRing(max_lines=0)

    # What structlog asks for

    def _out(self, name: str = OURS, *_: Any) -> Out:
        out = self._outs.get(name)
        if out is None:
            out = self._outs[name] = Out(room_of(name), self._write)
        return out

    def _logger(self, out: Out, processors: Any, context: Any) -> Any:
        """A line that is not wanted is not made: its method does nothing."""
        cls: Any = self._classes.get(out.room)
        if cls is None:
            cls = self._classes[out.room] = structlog.make_filtering_bound_logger(self.levels.of(out.room))
        return cls(out, processors, context)

    def _line_of(self, out: Any, _: str, event: Any) -> str:
        record = event.pop("_record", None)
        event.pop("_from_structlog", None)
        event["room"] = out.room if record is None else room_of(record.name)
        event.setdefault("pid", os.getpid())
        event["time"] = time.time() if record is None else record.created
        return self._rendered(event)

    def _rendered(self, event: Event) -> str:
        shown = dict(event) if self.pretty else event
        event = redact_event(dict(self._exceptions(None, "", event)), texts=self.texts)
        line = dumps({**{name: event[name] for name in FIRST if name in event}, **event})
        self.ring.add(LEVELS.get(str(event.get("level")), logging.INFO), str(event.get("room", "")), line)
        if not self.pretty:
            return line
        told = shown.pop("exception", ())  # of another process
        exc_info = shown.pop("exc_info", None)
        shown = {printable(name): _shown(value) for name, value in redact_event(shown, texts=self.texts).items() if name != "pid"}
        shown["timestamp"] = time.strftime("%H:%M:%S", time.localtime(float(shown.pop("time", 0.0))))
        if exc_info:
            shown["exc_info"] = exc_info
        if told:
            shown["exception"] = "\n".join(map(_told, told))
        return str(self._console(None, "", shown))

    def _write(self, line: str) -> None:
        with self._lock:
            self.stream.write(f"{self._mark}{line}\n")
            self.stream.flush()


_current: Journal | None = None


def journal() -> Journal:
    """This process's; one that nothing is written to, where logs were not configured."""
    global _current  # noqa: PLW0603  structlog's configuration is the process's, too
    if _current is None:
        _current = Journal()
    return _current


def configure_logs(
    level: Level = "info",
    style: LogFormat = "auto",
    stream: TextIO | None = None,
    *,
    levels: Mapping[str, Level] | None = None,
    texts: bool = False,
) -> Journal:
    """`levels`: of single rooms. `texts`: prompts and the like stand in lines as they are."""
    global _current  # noqa: PLW0603
    _current = Journal(level, style, stream, levels=levels, texts=texts)
    _current.install()
    return _current


def _shown(value: Any) -> Any:
    return printable(value) if isinstance(value, str) else value


def _told(exception: Any) -> str:
    """An exception as JSON has it, for people."""
    if not isinstance(exception, dict):
        return f"    {printable(str(exception))}"
    places = [
        f"{each.get('filename')}:{each.get('lineno')} in {each.get('name')}"
        for each in exception.get("frames", ())
        if isinstance(each, dict)
    ]
    lines = (*places, without_secrets(f"{exception.get('exc_type')}: {exception.get('exc_value')}"))
    return "\n".join(f"    {printable(line)}" for line in lines)


def _traceback(stream: TextIO, exc_info: Any) -> None:
    """Indented: no message can look like a line of its own."""
    text = io.StringIO()
    traceback.print_exception(*exc_info, file=text)
    lines = printable(without_secrets(text.getvalue().rstrip("\n")), lines=True).split("\n")
    stream.write("".join(f"\n    {line}" for line in lines))


def dumps(event: Event) -> str:
    try:
        text = msgspec.json.encode(event, enc_hook=str).decode()
    except UnicodeEncodeError:  # half a character
        text = msgspec.json.encode(_whole(event), enc_hook=str).decode()
    return plain_json(text)


def _whole(value: Any) -> Any:
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case dict():
            return {_whole(name): _whole(each) for name, each in value.items()}
        case list():
            return [_whole(each) for each in value]
    return value
