"""`python -m fairlead.control.scratch`: the process in which a version is validated, with all that its code starts.

It reads one `Plan` from its standard input and writes a line of JSON for each thing that happens. Its standard input stays open
as long as somebody wants to know: at its end, the process and its whole group end.
"""

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import BinaryIO

import msgspec
import structlog
from msgspec import Struct

from fairlead.control.gates.plan import Plan, Signature
from fairlead.control.gates.report import GateResult, Outcome, Verdict, failed, unknown
from fairlead.core.errors import FairleadError, InvalidRequest

log = structlog.get_logger("fairlead.control")

HEAD_BYTES = 8
"""Length of the plan, before the plan."""
CLOSE_SECONDS = 10.0


class Began(Struct, frozen=True, tag="began"):
    gate: str


class Ended(Struct, frozen=True, tag="ended"):
    result: GateResult


class Learned(Struct, frozen=True, tag="learned"):
    signature: Signature


Event = Began | Ended | Learned
Tell = Callable[[Event], None]


def packed_plan(plan: Plan) -> bytes:
    """As this process reads it."""
    body = msgspec.msgpack.encode(plan)
    return len(body).to_bytes(HEAD_BYTES, "little") + body


def read_plan(stream: BinaryIO) -> Plan:
    head = stream.read(HEAD_BYTES)
    return msgspec.msgpack.decode(stream.read(int.from_bytes(head, "little")), type=Plan)


async def run(plan: Plan, tell: Tell) -> None:
    """Every gate in order, as far as they can be asked."""
    # Imported here: who only wants to start this process needs neither NumPy's friends nor the runtime.
    from fairlead.control.gates.accuracy import accuracy
    from fairlead.control.gates.golden import golden
    from fairlead.control.gates.latency import latency
    from fairlead.control.gates.loading import load, warm_up
    from fairlead.control.gates.memory import memory, tree_bytes
    from fairlead.control.gates.safety import safety
    from fairlead.control.gates.sanity import sanity
    from fairlead.control.gates.schema import schema
    from fairlead.control.gates.trial import Trial, signature_of

    trial = Trial(plan, tree_bytes)
    try:
        for gate in (load, warm_up, schema, golden, sanity, safety, memory, accuracy, latency):
            name = gate.__name__
            tell(Began(name))
            began = time.perf_counter()
            verdict = await _verdict(name, gate(trial))
            result = GateResult(
                gate=name,
                outcome=verdict.outcome,
                message=verdict.message,
                seconds=time.perf_counter() - began,
                details=verdict.details,
            )
            tell(Ended(result))
            if trial.loaded and gate is load:
                tell(Learned(signature_of(trial.candidate)))
            if not trial.loaded and (gate is not load or verdict.outcome is not Outcome.PASSED):
                return
            if trial.loaded and trial.dying and verdict.outcome is Outcome.FAILED:
                return
    finally:
        await trial.close()


async def _verdict(name: str, gate: Awaitable[Verdict]) -> Verdict:
    from fairlead.control.gates.trial import ChampionMissing

    try:
        return await gate
    except ChampionMissing as error:
        return unknown(str(error))
    except InvalidRequest as error:
        return unknown(f"the checks do not fit the version: {error.message}")
    except FairleadError as error:
        return failed(error.message)
    except Exception as error:
        log.exception("gate failed", gate=name)
        return unknown(f"{type(error).__name__}: {error}")


def main() -> int:
    from fairlead.observe.logs import configure_logs

    events = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the version's code prints is no event
    plan = read_plan(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True, name="lifeline").start()
    configure_logs(plan.log_level, "console")

    def tell(event: Event) -> None:
        events.write(msgspec.json.encode(event) + b"\n")
        events.flush()

    try:
        import uvloop
    except ImportError:  # Windows
        asyncio.run(run(plan, tell))
    else:
        uvloop.run(run(plan, tell))
    return 0


def _end_with_parent() -> None:
    """At the end of the standard input."""
    while os.read(0, 4096):
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
