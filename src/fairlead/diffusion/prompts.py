"""The embeddings of prompts that were asked for lately: text encoders are large, and retries and variations repeat their texts."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class PromptCache(Generic[T]):
    """The `capacity` that were used last; 0 keeps none."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_hits = 0
        self.kept: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        if key in self.kept:
            self.num_hits += 1
            self.kept.move_to_end(key)
            return self.kept[key]
        value = compute()
        if self.capacity:
            self.kept[key] = value
            if len(self.kept) > self.capacity:
                self.kept.popitem(last=False)
        return value
