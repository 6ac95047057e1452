"""In the place of a CUDA device: computes in order what it was given, but late, when somebody waits for it."""

import random
from collections import deque
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch

from fairlead.llm.cuda.runner import Compute, CudaRunner
from fairlead.llm.engine import Engine
from fairlead.llm.runner import Chosen, Staged, Wait
from fairlead.llm.sampler import Sampled, Sampler, SampleRow


class Late:
    """What the device will have computed."""

    def __init__(self, device: "LateDevice", work: Callable[[], torch.Tensor]) -> None:
        self.device = device
        self.place = device.num_given
        self._work = work
        self._value: torch.Tensor | None = None
        self._error: Exception | None = None

    def compute(self) -> None:
        try:
            self._value = self._work()
        except Exception as error:
            self._error = error

    def value(self) -> torch.Tensor:
        self.device.wait(self.place)
        if self._error is not None:
            raise self._error
        assert self._value is not None
        return self._value

    def __getitem__(self, key: Any) -> "Late":
        return self.device.give(lambda: self.value()[key])


class LateDevice:
    def __init__(self, numbers: random.Random | None = None) -> None:
        """`numbers`: by which it is now and then ahead of who waits for it."""
        self.num_given = self.num_done = 0
        self.num_ahead = 0
        """Steps that were given to it while it had another to compute."""
        self._numbers = numbers
        self._queue: deque[Late] = deque()

    def give(self, work: Callable[[], torch.Tensor]) -> Late:
        self.num_given += 1
        late = Late(self, work)
        self._queue.append(late)
        if self._numbers is not None and self._numbers.random() < 0.5:
            self.wait(self.num_done + self._numbers.randrange(1 + self.num_given - self.num_done))
        return late

    def wait(self, place: int) -> None:
        while self.num_done < place:
            self.num_done += 1
            self._queue.popleft().compute()


class LateRunner(CudaRunner):
    device: LateDevice

    def mark(self) -> Wait:
        place = self.device.num_given
        return lambda: self.device.wait(place)

    def compute(self, staged: Staged, chosen: Chosen | None) -> Any:
        self.device.num_ahead += self.device.num_done < self.device.num_given
        return self.device.give(lambda: CudaRunner.compute(self, staged, known(chosen)))

    def replay(self, turn: int, size: int, chosen: Chosen | None) -> Any:
        self.device.num_ahead += self.device.num_done < self.device.num_given
        return self.device.give(lambda: CudaRunner.replay(self, turn, size, known(chosen)))

    def fetch(self, ids_N: Any) -> Callable[[], list[int]]:
        return lambda: ids_N.value().tolist()  # type: ignore[no-any-return]


def known(chosen: Chosen | None) -> Chosen | None:
    return None if chosen is None else Chosen(chosen.ids_N.value(), chosen.places)  # type: ignore[attr-defined]


class LateSampler(Sampler):
    """Of rows, what it needs when it is asked: they go on while the device computes."""

    def __init__(self, vocab_size: int, device: LateDevice) -> None:
        super().__init__(vocab_size)
        self.device = device

    def choose(self, logits_NV: Any, rows: Sequence[SampleRow], ahead: Sequence[int]) -> Any:
        rows = [copy(row) for row in rows]
        return self.device.give(lambda: Sampler.choose(self, logits_NV.value(), rows, ahead))

    def sample(self, logits_NV: Any, rows: Sequence[SampleRow]) -> list[Sampled]:
        return super().sample(logits_NV.value(), rows)

    def prompt_logprobs(self, logits_PV: Any, next_ids: Sequence[int], count: int) -> list[Sampled]:
        return super().prompt_logprobs(logits_PV.value(), next_ids, count)


def recorded(compute: Compute) -> Compute:
    """In the place of a CUDA graph: what it gives lies always in the same place."""
    out = compute().clone()

    def replay() -> torch.Tensor:
        return out.copy_(compute())

    return replay


def late(engine: Engine, *, captures: bool, numbers: random.Random | None = None) -> LateDevice:
    """From now on the engine's steps compute on one."""
    device = LateDevice(numbers)
    scheduler, before = engine.scheduler, engine.runner
    engine.runner = LateRunner(
        before.decoder,
        num_blocks=scheduler.pool.num_blocks,
        block_size=before.block_size,
        max_num_seqs=len(before.tables_RB),
        max_batch_tokens=scheduler.max_batch_tokens,
        max_model_len=engine.max_model_len,
        layout=before.layout,
        capture=recorded if captures else None,
    )
    engine.runner.device = device
    engine.sampler = LateSampler(engine.runner.decoder.vocab_size, device)
    return device
