"""What followed when these tokens stood there before (prompt lookup, Saxena 2023; as vLLM's ngram): answers repeat their prompts."""

LONG, SHORT = 4, 2
"""Tokens that must be the same for a place to be looked up: better as many as this, else so few."""
MAX_RUN = 8
"""Tokens the same before a place beyond which it makes no difference how many they are."""
MAX_PLACES = 16_384
"""Of one sequence that are remembered: the memory of a sequence is bounded, however long it is."""


class Repeats:
    """Where the last tokens of one sequence stood before, and how far they agree with what stood before them there.

    Each token is looked at once. While the tokens that come are those of the place that was found, the place moves along.
    """

    __slots__ = ("_long", "_num", "_short", "_token_ids", "place", "run")

    def __init__(self, token_ids: list[int]) -> None:
        """`token_ids` may grow, and only grow."""
        self._token_ids = token_ids
        self._num = 0
        """Of them that were looked at."""
        self._long: dict[tuple[int, ...], int] = {}
        self._short: dict[tuple[int, ...], int] = {}
        self.place = 0
        """Where the token stands that followed; 0: nowhere."""
        self.run = 0
        """Tokens before `place` that are the last ones of the sequence, at most MAX_RUN."""

    def catch_up(self) -> None:
        """Look at the tokens that are new."""
        ids = self._token_ids
        num = len(ids)
        if num == self._num + 1 and num >= LONG and len(self._long) < MAX_PLACES and len(self._short) < MAX_PLACES:
            self._look_at_one(ids, num)
            return
        if num - self._num > MAX_RUN:
            self._take_in(num - MAX_RUN)
        for end in range(self._num + 1, num + 1):
            place = self.place
            if place and ids[place] == ids[end - 1]:
                self.place = place + 1
                if self.run < MAX_RUN:
                    self.run += 1
            else:
                self.place = 0
            if end >= LONG:
                self._meet(self._long, tuple(ids[end - LONG : end]), end)
            if end >= SHORT:
                self._meet(self._short, (ids[end - 2], ids[end - 1]), end)
            if not self.place:
                self.run = 0
        self._num = num

    def _look_at_one(self, ids: list[int], num: int) -> None:
        """As every step does for every sequence: in line, for it is a part of each step's time."""
        self._num = num
        last = ids[-1]
        long, short = tuple(ids[-LONG:]), (ids[-2], last)
        place = self.place
        if place and ids[place] == last:
            self.place = place + 1
            if self.run < MAX_RUN:
                self.run += 1
        else:
            place = self._long.get(long, 0) or self._short.get(short, 0)
            self.place = place
            self.run = self._agreement(place, num) if place else 0
        self._long[long] = self._short[short] = num

    def _meet(self, places: dict[tuple[int, ...], int], key: tuple[int, ...], end: int) -> None:
        if not self.place:
            place = places.get(key, 0)
            if place:
                self.place, self.run = place, self._agreement(place, end)
        if len(places) >= MAX_PLACES:
            places.clear()
        places[key] = end

    def _agreement(self, place: int, end: int) -> int:
        ids, run = self._token_ids, SHORT
        while run < MAX_RUN and run < place and ids[place - run - 1] == ids[end - run - 1]:
            run += 1
        return run

    def _take_in(self, end: int) -> None:
        """Many tokens at once, as of a prompt; no place is looked up for them."""
        ids, start = self._token_ids, max(self._num - LONG + 1, end - MAX_PLACES, 0)
        tail = ids[start:end]
        for places, size in ((self._long, LONG), (self._short, SHORT)):
            if len(places) + len(tail) > MAX_PLACES:
                places.clear()
            shifted = [tail[i:] for i in range(size)]
            places.update(zip(zip(*shifted, strict=False), range(start + size, end + 1), strict=False))
        self.place = self.run = 0
        self._num = end

    def guess(self, num_tokens: int) -> list[int]:
        """So many tokens that may follow; what follows the end is taken from the beginning of the repetition."""
        ids, place = self._token_ids, self.place
        guessed = ids[place : place + num_tokens]
        while len(guessed) < num_tokens:
            guessed += guessed[: num_tokens - len(guessed)]
        return guessed


def agreement_class(run: int) -> int:
    """Places whose surroundings agree about as well, which are about as often right."""
    return 0 if run < LONG else 1 if run < MAX_RUN else 2


NUM_CLASSES = 3
