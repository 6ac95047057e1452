"""A version on trial: loaded, with all that gates ask it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fairlead.control.checks import Checks
from fairlead.control.gates.asking import MAX_DEATHS, made_requests, request_of, rows_of
from fairlead.control.gates.plan import Plan, Signature, Subject
from fairlead.core.errors import FairleadError, LoadError
from fairlead.core.request import Request
from fairlead.runtime.engine_version import EngineVersion
from fairlead.runtime.forkserver import ForkServer
from fairlead.runtime.loading import load_version
from fairlead.runtime.version import ModelVersion, Version
from fairlead.runtime.warmup import samples_of

NUM_QUESTIONS = 64
"""At most so many different requests for the gates that need any, whatever they are."""
DRAIN_SECONDS = 5.0


class ChampionMissing(Exception):
    """It could not be loaded: not the candidate's fault."""


class Trial:
    def __init__(self, plan: Plan, measure: Callable[[], int]) -> None:
        """`measure`: bytes that this process and its children hold."""
        self.plan = plan
        self.checks: Checks = plan.checks
        self.rules = plan.checks.rules
        self.measure = measure
        self.warm_up_error = ""
        self.empty_bytes = 0
        """Before anything was loaded; what the champion takes is added."""
        self._forkserver = ForkServer(plan.log_level, "auto")
        self._candidate: Version | None = None
        self._champion: Version | None = None

    async def load(self) -> None:
        """The candidate. Raises LoadError or ConfigError."""
        self.empty_bytes = self.measure()
        self._candidate = await self._load(self.plan.candidate)

    async def _load(self, subject: Subject) -> Version:
        return await load_version(subject.spec, subject.version, Path(subject.folder), self._forkserver)

    @property
    def loaded(self) -> bool:
        return self._candidate is not None

    @property
    def candidate(self) -> Version:
        assert self._candidate is not None
        return self._candidate

    @property
    def dying(self) -> bool:
        """Whether its processes die again and again."""
        return self.candidate.metrics.restarts() >= MAX_DEATHS

    @property
    def has_champion(self) -> bool:
        return self.plan.champion is not None

    async def champion(self) -> Version:
        """Loaded when it is first asked for. Raises ChampionMissing."""
        if self._champion is None:
            assert self.plan.champion is not None
            before = self.measure()
            try:
                self._champion = await self._load(self.plan.champion)
            except FairleadError as error:
                raise ChampionMissing(f"the champion cannot be loaded: {error.message}") from None
            self.empty_bytes += max(self.measure() - before, 0)
        return self._champion

    async def champions_signature(self) -> Signature | None:
        """Raises ChampionMissing."""
        if self.plan.signature is not None or not self.has_champion:
            return self.plan.signature
        return signature_of(await self.champion())

    def given(self) -> list[Request]:
        """Questions of the checks: golden examples first, then rows of the data set. Raises InvalidRequest."""
        spec = self.candidate.spec
        requests = [request_of(each, spec.name) for each in self.checks.golden[:NUM_QUESTIONS]]
        dataset, left = self.checks.dataset, NUM_QUESTIONS - len(requests)
        if dataset is not None and left > 0:
            rows = np.unique(np.linspace(0, dataset.num_rows - 1, left).astype(int))
            if dataset.questions:
                requests += [request_of(dataset.questions[row], spec.name) for row in rows]
            else:
                arrays = {name: array.array()[rows] for name, array in dataset.inputs.items()}
                requests += [request for request, _ in rows_of(spec, arrays, at_once=1)]
        return requests

    def questions(self) -> list[Request]:
        """Those of the checks, else the model's own samples, else made up. Raises InvalidRequest."""
        if given := self.given():
            return given
        version = self.candidate
        example = version.example if isinstance(version, ModelVersion) else None
        try:
            samples = samples_of(version.spec, example)
        except LoadError:  # loading has used them: then there are others now
            samples = []
        if samples:
            return [Request(model=version.name, inputs=sample) for sample in samples[:NUM_QUESTIONS]]
        return made_requests(version.spec, tasks_of(version), NUM_QUESTIONS)

    async def close(self) -> None:
        for version in (self._candidate, self._champion):
            if version is not None:
                await version.drain(DRAIN_SECONDS)
        await self._forkserver.close()


def tasks_of(version: Version) -> tuple[str, ...]:
    return version.info.tasks if isinstance(version, EngineVersion) else ()


def signature_of(version: Version) -> Signature:
    spec = version.spec
    told = Signature(platform=version.platform, inputs=spec.inputs, outputs=spec.outputs, streams=spec.streams, batches=spec.batches)
    if not isinstance(version, EngineVersion):
        return told
    info = version.info
    return Signature(
        platform=told.platform,
        inputs=told.inputs,
        outputs=told.outputs,
        streams=told.streams,
        batches=told.batches,
        tasks=info.tasks,
        has_chat_template=info.has_chat_template,
        embedding_size=info.embedding_size,
        max_model_len=info.max_model_len,
    )
