"""What a line of the log costs, and one that is not written: `python benchmarks/observe/logs.py`."""

import io
import time
from collections.abc import Callable

import structlog

from fairlead.core.logs import Bodies as BodySettings
from fairlead.gateway.bodies import Bodies
from fairlead.observe.logs import configure_logs

ROUNDS, CALLS = 30, 5_000


def nanoseconds(call: Callable[[], object]) -> float:
    """Of one call: in the quickest of rounds, for others' work is not its own."""
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        rounds.append((time.perf_counter() - began) / CALLS * 1e9)
    return min(rounds)


def calls(log: structlog.stdlib.BoundLogger) -> dict[str, Callable[[], object]]:
    return {
        "debug that is off": lambda: log.debug("thinking", model="chat", seconds=0.123),
        "line of 5 fields": lambda: log.info("model loaded", model="chat", version="3", seconds=0.123, restarts=3, platform="onnx"),
        "line with a secret and a prompt": lambda: log.info(
            "failed", url="redis://:hunter2@there", prompt="x" * 500, headers={"cookie": "abcd"}
        ),
    }


def main() -> None:
    log = structlog.get_logger("fairlead.gateway")
    rows: dict[str, list[float]] = {}
    for name in ("before", "now"):
        if name == "before":  # as structlog is configured without rooms, levels of theirs, redaction and the ring
            structlog.configure(
                processors=[
                    structlog.stdlib.add_log_level,
                    structlog.processors.TimeStamper(key="time"),
                    structlog.processors.JSONRenderer(),
                ],
                wrapper_class=structlog.make_filtering_bound_logger("info"),
                logger_factory=structlog.PrintLoggerFactory(io.StringIO()),
            )
        else:
            configure_logs("info", "json", io.StringIO(), levels={"runtime": "debug"})
        for what, call in calls(log).items():
            rows.setdefault(what, []).append(nanoseconds(call))
    rare = Bodies(BodySettings(share=1e-9))
    rows["bodies: a request that is not sampled"] = [0.0, nanoseconds(lambda: rare.begin("chat"))]
    print(f"{'':40} {'plain structlog':>16} {'Fairlead':>12}")
    for what, (before, now) in rows.items():
        print(f"{what:40} {before / 1e3:13.2f} us {now / 1e3:9.2f} us")


if __name__ == "__main__":
    main()
