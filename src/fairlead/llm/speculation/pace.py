"""How long drafts should be, from what they cost and how often they are right. Pure: seconds are told, none are taken.

A token more in a draft is worth its while where its chance to be accepted is above its price: the time that one more token
of a draft takes, in tokens that the engine makes meanwhile. Both sides are measured. What drafts cost is the difference
between steps with and without them at the same number of sequences, the proposing included; now and then a step goes
without, to know. Where no draft is worth its price there are none, but for trials, which may take a hundredth of the time.
"""

import math
from collections import deque

LEAST_PRICE = 0.02
HALF_PRICE_SEQS = 16
"""Sequences at which a token more is thought to take half of a token's time, before anything was measured."""
PRICE_WEIGHT = 4
"""Steps with drafts that weigh as much as what is thought."""
SLOW_START = ((4, 2), (8, 4))
"""Steps with drafts until which they have so many tokens at most: nothing is known yet of what longer ones cost."""
WINDOW = 33
"""Steps of each kind whose median counts: what else the machine does makes some of them much slower."""
MEMORY = 1 - 1 / 64
"""What a step's tokens weigh against the next one's."""
NUM_PLAIN = 3
"""Steps without drafts before the first with them."""
PLAIN_EVERY = 64
"""Steps with drafts until one without; fewer while few were without."""
WITHOUT = 2.0
"""A price that nothing is worth."""
NOTED_EVERY = 8
"""Steps without drafts of which one is noted, once enough are: what is off is to cost nothing."""
TRIAL_SHARE = 0.01
MAX_CREDIT, MAX_DEBT = 8, 1024
"""Steps whose share may be saved up, and steps until there may be a trial again, whatever the last one cost."""


def length(rate: float, price: float, most: int) -> int:
    """Of a draft whose every token is right at `rate` where those before it are: the place of the last token that is worth its
    price, at most `most`."""
    if rate <= price or most < 1:
        return 0
    if rate >= 1.0:
        return most
    return min(most, int(math.log(price) / math.log(rate) + 1e-9))


class Rate:
    """How often tokens of drafts were right, the last ones counting most."""

    __slots__ = ("_num", "_weight", "value")

    def __init__(self, value: float, weight: float, *, num: int = 2) -> None:
        """`value`: what is thought before, as if it had been seen in `num` drafts; `weight`: of the next draft, in the end."""
        self.value = value
        self._weight = weight
        self._num = num

    def note(self, num_accepted: int, num_drafts: int) -> None:
        """Of a draft's tokens those up to the first that was not chosen were looked at."""
        self._num += 1
        weight = max(self._weight, 1.0 / self._num)
        self.value = 1.0 - (1.0 - self.value) * (1.0 - weight) ** num_accepted
        if num_accepted < num_drafts:
            self.value *= 1.0 - weight


class _Window:
    """The last values of something noisy."""

    __slots__ = ("_values", "median", "num")

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=WINDOW)
        self.num = 0
        self.median = 0.0

    def add(self, value: float) -> None:
        self._values.append(value)
        self.num += 1
        if self.num < 8 or not self.num % 4:
            self.median = sorted(self._values)[len(self._values) // 2]


class _Size:
    """What is known of steps of about so many sequences."""

    __slots__ = (
        "_caught_up",
        "_drafted",
        "_drafts",
        "_first_price",
        "_most",
        "_steps",
        "_tokens",
        "extra",
        "most",
        "num_unnoted",
        "plain",
        "plain_due",
        "price",
        "since_plain",
    )

    def __init__(self, num_seqs: int, most: int) -> None:
        self._most = most
        self._first_price = num_seqs / (num_seqs + HALF_PRICE_SEQS)
        self.plain = _Window()
        """Seconds of a step without drafts."""
        self.extra = _Window()
        """Seconds more for each token of a draft."""
        self._steps = self._tokens = self._drafts = 0.0
        """Lately: steps, tokens that they gave, tokens of drafts in them."""
        self._caught_up = self._drafted = 0.0
        """In the last steps with drafts: seconds in which a draft model only caught up, and tokens of drafts."""
        self.since_plain = 0
        self.num_unnoted = 0
        """Steps without drafts since the last that was noted."""
        self.price = self._first_price
        self.most = min(SLOW_START[0][1], most)
        """Tokens of a draft, for now."""
        self.plain_due = True
        """Whether the next step goes without drafts."""

    def add(self, num_tokens: int, num_drafts: int, seconds: float, catch_up: float, *, times: int = 1) -> None:
        """`times`: for how many steps this one stands."""
        if num_drafts:
            self.since_plain += 1
            self.extra.add((seconds - self.plain.median) / num_drafts)
        else:
            self.since_plain = 0
            self.plain.add(seconds)
        self._steps = self._steps * MEMORY + times
        self._tokens = self._tokens * MEMORY + num_tokens * times
        self._drafts = self._drafts * MEMORY + num_drafts
        if num_drafts or catch_up:
            self._caught_up = self._caught_up * MEMORY + catch_up
            self._drafted = self._drafted * MEMORY + num_drafts
        self.price = self._measured()
        self.most = min([self._most, *(most for num, most in SLOW_START if self.extra.num < num)])
        num_plain = self.plain.num
        self.plain_due = num_plain < NUM_PLAIN or self.since_plain >= min(PLAIN_EVERY, 8 * num_plain)

    @property
    def cost(self) -> float:
        """Seconds for one more token of a draft."""
        return max(self.extra.median, 0.0) + self._caught_up / max(self._drafted, 1.0)

    def _measured(self) -> float:
        num = min(self.extra.num, WINDOW)
        if not num:
            return self._first_price
        cost = self.cost
        seconds = self._steps * self.plain.median + cost * self._drafts
        measured = cost * self._tokens / seconds if seconds else 0.0
        return max((PRICE_WEIGHT * self._first_price + num * measured) / (PRICE_WEIGHT + num), LEAST_PRICE)


class Pace:
    """Of one engine. A step is announced with `begin`, then sequences ask for their `length`, then it is told with `end`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.price = WITHOUT
        """Of one token more in a draft, in this step."""
        self._sizes: dict[int, _Size] = {}
        self._size = _Size(1, most)
        self._credit = 0.0

    def begin(self, num_seqs: int) -> None:
        """The next step has about so many sequences."""
        bucket = num_seqs if num_seqs <= 4 else int(2 * math.log2(num_seqs))
        size = self._sizes.get(bucket)
        if size is None:
            size = self._sizes[bucket] = _Size(num_seqs, self.most)
        self._size = size
        self.price = WITHOUT if size.plain_due else size.price

    def length(self, rate: float, most: int) -> int:
        return length(rate, self.price, min(most, self._size.most))

    @property
    def tries(self) -> bool:
        """Whether a sequence whose drafts are not worth their price may have one all the same in this step."""
        return self.price < WITHOUT and self._credit >= 0.0

    @property
    def notes(self) -> bool:
        """Whether this step is noted though it goes without drafts."""
        size = self._size
        return size.plain.num < WINDOW or size.num_unnoted + 1 >= NOTED_EVERY

    def end(self, num_tokens: int, num_drafts: int, seconds: float, *, num_tried: int = 0, catch_up: float = 0.0) -> None:
        """A step in which every sequence decoded gave so many tokens, with that many of drafts computed. `num_tried`: of
        those, in trials; `catch_up`: of the seconds, those in which a draft model caught up."""
        size = self._size
        times = 1
        if not num_drafts and not catch_up:
            noted = self.notes
            size.since_plain = 0
            size.num_unnoted += 1
            if not noted:
                size.plain_due = False
                return
            times, size.num_unnoted = size.num_unnoted, 0
        only_tried = 0 < num_drafts == num_tried
        size.add(num_tokens, num_drafts, seconds - catch_up, 0.0 if only_tried else catch_up, times=times)
        share = TRIAL_SHARE * size.plain.median * times
        spent = num_tried * size.cost + (catch_up if only_tried else 0.0)
        self._credit = min(max(self._credit + share - spent, -MAX_DEBT * share), MAX_CREDIT * share)
