"""What a generation went through, for whoever asks why it took so long. Written at its turns; per token only two maxima are kept."""

from collections.abc import Sequence

from fairlead.core.generation import Phase

MAX_PHASES = 64
"""Of one sequence: one that is preempted again and again has its later stretches added to those before."""


class Trail:
    """Of one sequence. Times count from its request's arrival."""

    __slots__ = ("_arrived", "_at", "_step", "_tokens", "max_seqs", "name", "phases", "slowest")

    def __init__(self, arrived: float, num_tokens: int) -> None:
        self.name = "waiting"
        """The phase that lasts."""
        self.phases: list[Phase] = []
        self.max_seqs = 0
        self.slowest = 0.0
        self._arrived = self._at = arrived
        self._step = 0
        self._tokens = num_tokens

    def turn(self, name: str, now: float, *, step: int, num_tokens: int) -> None:
        """Another phase begins, "" for none. `step`: the engine's number of steps until now; `num_tokens`: known of the sequence,
        or computed already where it begins to prefill."""
        computes = self.name in ("prefill", "decode")
        phase = Phase(
            self.name,
            self._at - self._arrived,
            now - self._at,
            step - self._step if computes else 0,
            num_tokens - self._tokens if computes and (self.name, name) != ("prefill", "preempted") else 0,
            self.max_seqs,
            self.slowest,
        )
        if len(self.phases) < MAX_PHASES:
            self.phases.append(phase)
        else:
            add_to(self.phases, phase)
        self.name = name
        self._at, self._step, self._tokens = now, step, num_tokens
        self.max_seqs, self.slowest = 0, 0.0


def add_to(phases: Sequence[Phase], more: Phase) -> None:
    for phase in reversed(phases):
        if phase.name == more.name:
            phase.seconds += more.seconds
            phase.num_steps += more.num_steps
            phase.num_tokens += more.num_tokens
            phase.max_seqs = max(phase.max_seqs, more.max_seqs)
            phase.slowest = max(phase.slowest, more.slowest)
            return


def merged(trails: Sequence[Trail]) -> list[Phase]:
    """Of the n choices of one request: until the first one's first token the first one's, for the prompt is computed there; from then on
    those of the one that ended last. Tokens are of all."""
    first = trails[0].phases
    if len(trails) == 1:
        return first
    last = max((trail.phases for trail in trails), key=lambda phases: phases[-1].start + phases[-1].seconds)
    since = next((phase.start for phase in first if phase.name == "decode"), first[-1].start + first[-1].seconds)
    tail = [phase for phase in last if phase.start + phase.seconds > since]
    for phase in tail:
        hidden = max(since - phase.start, 0.0)
        phase.start += hidden
        phase.seconds -= hidden
    decoded = [phase for phase in tail if phase.name == "decode"]
    if decoded:
        total = sum(phase.num_tokens for trail in trails for phase in trail.phases if phase.name == "decode")
        decoded[-1].num_tokens = total - sum(phase.num_tokens for phase in decoded[:-1])
    return [phase for phase in first if phase.start < since] + tail
