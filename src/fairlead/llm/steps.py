"""Steps in flight: given to the device, and not read by the host yet."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch

from fairlead.llm.runner import Chosen, wants_prompt_logits
from fairlead.llm.sampler import SampleRow
from fairlead.llm.scheduler import Chunk, Plan


@dataclass(slots=True)
class Flight:
    """One step. Its tokens are chosen on the device, or from its logits when the host reads it."""

    plan: Plan
    chunks: list[Chunk]
    """Of the plan, those that sample."""
    rows: list[SampleRow]
    """Of those, in order."""
    logits_NV: torch.Tensor | None = None
    """Where the host chooses."""
    chosen: Chosen | None = None
    """Where the device does."""
    read: Callable[[], list[int]] = field(default=list)
    """Waits for what it chose."""


def chosen_on_device(plan: Plan, rows: Seq[SampleRow]) -> bool:
    """Whether nothing of the step's logits is wanted but tokens, as they are. `rows`: of those that sample."""
    return not plan.num_drafts and all(row.on_device for row in rows) and not any(wants_prompt_logits(chunk) for chunk in plan.chunks)


def may_fly_ahead(flights: Seq[Flight], *, recovering: bool, speculating: bool) -> bool:
    """Whether another step may be planned before the host has read the one in flight: the device knows its tokens, and nothing that
    is to be decided depends on them. Drafts are guessed from what is known, and who made a step fail is looked for one by one."""
    return len(flights) == 1 and flights[0].chosen is not None and not recovering and not speculating
