"""Timelines as the rooms write them, for the tests beside this file."""

from typing import Any

from fairlead.core.generation import Phase, Sampling, Usage
from fairlead.core.timeline import BatchNote, Phases, Timeline

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
CALLERS = f"00-{TRACE}-{PARENT}-01"
NOT_SAMPLED = f"00-{TRACE}-{PARENT}-00"


def timeline(request_id: str = "r-1", *, protocol: str = "http", arrived: float = 100.0, seconds: float = 1.0, **said: Any) -> Timeline:
    """One that has ended well."""
    made = Timeline(request_id, protocol, arrived)
    made.path, made.model, made.kind = "/v2/models/{model}/infer", "fraud", "infer"
    made.status, made.outcome, made.ended = 200 if protocol == "http" else 0, "success", arrived + seconds
    for name, value in said.items():
        setattr(made, name, value)
    return made


def batched(arrived: float, note: BatchNote, request_id: str = "r-1") -> Timeline:
    made = timeline(request_id, arrived=arrived, seconds=0.1, rows=1)
    made.events = [(arrived + 0.001, "decoded", None), (note.began, "batched", note), (note.ended, "computed", None)]
    made.events.append((arrived + 0.1, "encoded", None))
    return made


def batch_note(began: float = 100.02) -> BatchNote:
    return BatchNote(
        model="fraud", version="3", number=17, close_reason="full", rows=8, num_requests=2, instance=0, began=began, ended=began + 0.05
    )


def chat(arrived: float = 100.0) -> Timeline:
    """A stream of a language model, after a wait in the gateway's line."""
    made = timeline(arrived=arrived, seconds=2.0, kind="generate", path="/v1/chat/completions", model="llama", version="1")
    made.usage = Usage(prompt_tokens=11, completion_tokens=7, cached_tokens=4)
    made.asked = Sampling(max_tokens=64, temperature=0.0, seed=7)
    made.finish_reasons = ("stop",)
    made.first_at = arrived + 1.2
    phases = [Phase("waiting", 0.0, 0.05), Phase("prefill", 0.05, 0.1, 1, 11), Phase("decode", 0.15, 0.8, 7, 7, 3, 0.2)]
    made.events = [
        (arrived + 0.002, "decoded", None),
        (arrived + 0.00201, "admitted", {"class": "standard", "priority": 0}),
        (arrived + 0.003, "queued", {"ahead": 3, "in_flight": 4}),
        (arrived + 1.0, "turn", None),
        (arrived + 1.001, "sent", {"place": "llama@1#0", "version": "1", "attempt": 1}),
        (arrived + 1.2, "first", None),
        (arrived + 1.01, "engine", Phases(model="llama", version="1", instance=0, phases=phases)),
    ]
    return made
