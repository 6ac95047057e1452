"""Stored answers to nearly the same question: what was asked last, as vectors of a served embedder, per tenant.

Only the keys of answers are here; the answers are in the response cache. Vectors of one bucket are compared by one product of
a matrix and a vector.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import numpy as np
import structlog

from fairlead.core.errors import FairleadError
from fairlead.gateway.reuse.keys import Question

log = structlog.get_logger("fairlead.gateway")

MAX_QUESTIONS = 1000
"""Of one tenant; the oldest are forgotten."""
MAX_TOGETHER = 50_000
"""Of all tenants; the one that asked nothing for longest is forgotten."""
EMBED_SECONDS = 2.0

Embed = Callable[[str], Awaitable[np.ndarray]]


class Semantic:
    def __init__(self, *, max_questions: int = MAX_QUESTIONS, max_together: int = MAX_TOGETHER) -> None:
        self.max_questions = max_questions
        self.max_together = max_together
        self.num_questions = 0
        self._tenants: OrderedDict[str, _Asked] = OrderedDict()

    def find(self, question: Question, vector: np.ndarray, threshold: float) -> bytes | None:
        """The key of the answer to the nearest question, if its cosine is at least `threshold`."""
        asked = self._tenants.get(question.tenant)
        if asked is None:
            return None
        self._tenants.move_to_end(question.tenant)
        return asked.nearest(question.bucket, vector, threshold)

    def add(self, question: Question, vector: np.ndarray, key: bytes) -> None:
        """`key`: of the answer in the response cache."""
        asked = self._tenants.setdefault(question.tenant, _Asked())
        self._tenants.move_to_end(question.tenant)
        before = len(asked.order)
        asked.add(question.bucket, vector, key, self.max_questions)
        self.num_questions += len(asked.order) - before
        while self.num_questions > self.max_together:
            _, forgotten = self._tenants.popitem(last=False)
            self.num_questions -= len(forgotten.order)

    def forget(self, question: Question, key: bytes) -> None:
        """Its answer is not stored any more."""
        asked = self._tenants.get(question.tenant)
        if asked is not None:
            before = len(asked.order)
            asked.remove(question.bucket, key)
            self.num_questions += len(asked.order) - before


async def embedded(embed: Embed, text: str) -> np.ndarray | None:
    """The vector of a text, of length 1; None where there is none in time, which is a miss."""
    try:
        async with asyncio.timeout(EMBED_SECONDS):
            vector = np.asarray(await embed(text), np.float32).reshape(-1)
    except (FairleadError, TimeoutError) as error:
        log.warning("no vector for the semantic cache", error=f"{type(error).__name__}: {error}")
        return None
    length = float(np.linalg.norm(vector))
    if not 0.0 < length < float("inf"):  # NaN neither
        return None
    return vector / np.float32(length)


class _Asked:
    """The questions of one tenant."""

    def __init__(self) -> None:
        self.buckets: dict[bytes, _Bucket] = {}
        self.order: OrderedDict[tuple[bytes, bytes], None] = OrderedDict()
        """(bucket, key), the oldest first."""

    def nearest(self, bucket: bytes, vector: np.ndarray, threshold: float) -> bytes | None:
        found = self.buckets.get(bucket)
        return None if found is None else found.nearest(vector, threshold)

    def add(self, bucket: bytes, vector: np.ndarray, key: bytes, most: int) -> None:
        self.remove(bucket, key)
        if len(self.order) >= most:
            self.remove(*next(iter(self.order)))
        found = self.buckets.get(bucket)
        if found is None or found.vectors.shape[1] != vector.size:  # the embedder was replaced by another
            for old in found.keys if found is not None else ():
                del self.order[bucket, old]
            found = self.buckets[bucket] = _Bucket(vector.size)
        found.add(vector, key)
        self.order[bucket, key] = None

    def remove(self, bucket: bytes, key: bytes) -> None:
        if (bucket, key) in self.order:
            del self.order[bucket, key]
            found = self.buckets[bucket]
            found.remove(key)
            if not found.keys:
                del self.buckets[bucket]


class _Bucket:
    """Questions that may share answers: all but the last message is equal."""

    def __init__(self, size: int) -> None:
        self.vectors = np.empty((1, size), np.float32)
        """The first len(keys) rows count."""
        self.keys: list[bytes] = []

    def nearest(self, vector: np.ndarray, threshold: float) -> bytes | None:
        num = len(self.keys)
        if not num or vector.size != self.vectors.shape[1]:
            return None
        cosines = self.vectors[:num] @ vector
        best = int(cosines.argmax())
        # what rounding takes from the cosine of a vector with itself
        return self.keys[best] if cosines[best] >= threshold - 1e-6 else None

    def add(self, vector: np.ndarray, key: bytes) -> None:
        num = len(self.keys)
        if num == len(self.vectors):
            self.vectors = np.concatenate((self.vectors, np.empty_like(self.vectors)))
        self.vectors[num] = vector
        self.keys.append(key)

    def remove(self, key: bytes) -> None:
        at = self.keys.index(key)
        last = len(self.keys) - 1
        self.vectors[at] = self.vectors[last]
        self.keys[at] = self.keys[last]
        self.keys.pop()
