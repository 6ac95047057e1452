"""The text of one answer on its way out: given on as soon as nothing that is still to come can alter what was found in it."""

from collections.abc import Sequence

from msgspec import structs

from fairlead.gateway.filters.finding import CONTEXT, Finding, Scan, label, place_of


class Window:
    """Places are characters from the beginning of the whole text."""

    def __init__(self, scans: Sequence[Scan]) -> None:
        self._scans = scans
        self._at = [0] * len(scans)
        """Up to where each has searched for good."""
        self._text = ""
        """The end of what has come: what is held, and CONTEXT before it."""
        self._base = 0
        """Where that begins."""
        self._found: list[Finding] = []
        """Not given on yet."""
        self.given = 0
        """Up to where the text was given on."""
        self._taken = 0
        """Up to where it was taken out: what begins before is taken out with it."""
        self.redacted: list[tuple[int, int]] = []
        """What was taken out by the last push."""
        self.blocked = ""
        """The rule that ended it."""
        self.rules: set[str] = set()
        """All that were hit."""

    @property
    def end(self) -> int:
        return self._base + len(self._text)

    def push(self, piece: str, last: bool) -> str:
        """What may go out now. Nothing more is pushed after it is blocked."""
        base = self._base
        text = self._text = self._text + piece
        sure = base + len(text)
        for number, scan in enumerate(self._scans):
            found, at = scan(text, self._at[number] - base, last)
            at = self._at[number] = at + base
            sure = min(sure, at)
            for finding in found:
                self.rules.add(finding.rule)
                if finding.action != "flag":
                    self._found.append(structs.replace(finding, start=finding.start + base, end=finding.end + base))
        if self._found:
            return self._give_found(sure)
        self.redacted = []
        return self._give(max(sure, self.given))

    def _give_found(self, sure: int) -> str:
        block = min((finding for finding in self._found if finding.action == "block"), key=place_of, default=None)
        stop = sure if block is None else min(block.start, sure)
        parts: list[str] = []
        self.redacted = []
        for finding in sorted(self._found, key=place_of):
            if finding.start >= stop:
                break
            if finding.start >= self._taken:
                parts += (self._give(finding.start), label(finding.rule))
            self._taken = self.given = max(self._taken, finding.end)
            self.redacted.append((finding.start, finding.end))
        if block is not None and block.start <= sure:
            self.blocked = block.rule
        self._found = [finding for finding in self._found if finding.start >= stop]
        parts.append(self._give(max(stop, self.given)))
        return "".join(parts)

    def _give(self, stop: int) -> str:
        """The text up to a place, as it is; what nobody needs to see again is forgotten."""
        given = self._text[self.given - self._base : stop - self._base]
        self.given = stop
        keep = min(self.given, min(self._at, default=stop)) - CONTEXT
        if keep > self._base:
            self._text = self._text[keep - self._base :]
            self._base = keep
        return given
