"""Draws docs/queueing.svg and prints the numbers of docs/queueing.md: a light tenant beside one that floods the line.

PYTHONPATH=. python benchmarks/gateway/queue_picture.py
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from fairlead.core.policy import QueueSettings
from fairlead.gateway.queue import FairQueue
from tests.gateway.simulate import Asked, Fifo, Run, Tenant, quantile, simulate

SLOTS, UNTIL = 8, 420.0
FLOOD = (60.0, 240.0)
LIGHT = Tenant(name="light", work=lambda rng: rng.expovariate(1.0), rate=1.0)
FLOODING = Tenant(name="flood", work=lambda rng: rng.expovariate(1.0), rate=12.0, begins=FLOOD[0], ends=FLOOD[1])

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 400, 64, 20, 56, 48
MOST_SECONDS = 70.0
FAIR, FIFO, INK, FAINT = "#0b7285", "#d9480f", "#343a40", "#dee2e6"


def run(kind: type[FairQueue] | type[Fifo], seed: int = 1) -> Run:
    return simulate(kind(QueueSettings(), SLOTS), [LIGHT, FLOODING], slots=SLOTS, until=UNTIL, seed=seed)


def x(seconds: float) -> float:
    return LEFT + seconds / UNTIL * (WIDTH - LEFT - RIGHT)


def y(seconds: float) -> float:
    return HEIGHT - BOTTOM - seconds / MOST_SECONDS * (HEIGHT - TOP - BOTTOM)


def text(at_x: float, at_y: float, words: str, *, anchor: str = "start", colour: str = INK, size: int = 13) -> str:
    return f'<text x="{at_x:.1f}" y="{at_y:.1f}" fill="{colour}" font-size="{size}" text-anchor="{anchor}">{words}</text>'


def frame() -> list[str]:
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<rect x="{x(FLOOD[0]):.1f}" y="{TOP}" width="{x(FLOOD[1]) - x(FLOOD[0]):.1f}" height="{HEIGHT - TOP - BOTTOM}" fill="#f8f1e4"/>',
        text(x(sum(FLOOD) / 2), TOP + 18, "another tenant sends 1.5 times what the model can do", anchor="middle", size=12),
    ]
    for seconds in range(0, 61, 10):
        lines.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(seconds):.1f}" y2="{y(seconds):.1f}" stroke="{FAINT}" stroke-width="1"/>'
        )
        lines.append(text(LEFT - 8, y(seconds) + 4, f"{seconds} s", anchor="end", size=12))
    lines += [text(x(seconds), HEIGHT - BOTTOM + 20, f"{seconds} s", anchor="middle", size=12) for seconds in range(0, 421, 60)]
    lines.append(text(LEFT, 20, "How long each request of a light tenant waits for its turn (each dot is one request)", size=15))
    lines.append(text(x(UNTIL / 2), HEIGHT - 8, "when it was sent", anchor="middle", size=12))
    return lines


def dots(items: Sequence[Asked], colour: str) -> list[str]:
    lines = []
    for item in items:
        if item.outcome == "served":
            lines.append(f'<circle cx="{x(item.arrived):.1f}" cy="{y(item.waited):.1f}" r="2.6" fill="{colour}" fill-opacity="0.75"/>')
        elif item.outcome:
            at_x, at_y = x(item.arrived), y(item.ended - item.arrived)
            lines.append(f'<path d="M{at_x - 3:.1f} {at_y - 3:.1f}l6 6m0 -6l-6 6" stroke="{colour}" stroke-width="1.4" fill="none"/>')
    return lines


def picture(fair: Run, fifo: Run) -> str:
    lines = frame()
    for number, (name, colour, result) in enumerate((("first come, first served", FIFO, fifo), ("fair queue", FAIR, fair))):
        items = [item for item in result.asked if item.tenant == "light"]
        lines += dots(items, colour)
        at = LEFT + 240 * number
        lines.append(f'<circle cx="{at + 5}" cy="38" r="5" fill="{colour}"/>')
        lines.append(text(at + 16, 42, name, colour=colour))
    lines.append(text(LEFT + 400, 42, "cross: refused (waited 60 s)", size=12))
    return "\n".join([*lines, "</svg>\n"])


def row(name: str, result: Run) -> str:
    items = [item for item in result.asked if item.tenant == "light" and FLOOD[0] <= item.arrived < FLOOD[1]]
    waits = [item.waited for item in items if item.outcome == "served"]
    refused = sum(item.outcome not in ("served", "") for item in items)
    return f"| {name} | {median(waits):.2f} s | {quantile(waits, 0.99):.2f} s | {refused} of {len(items)} | {result.busy_seconds / SLOTS / UNTIL:.0%} |"


if __name__ == "__main__":
    fair, fifo = run(FairQueue), run(Fifo)
    Path("docs/queueing.svg").write_text(picture(fair, fifo), encoding="utf-8")
    print("| line | median wait | p99 wait | refused | slots busy |\n|---|---|---|---|---|")
    print(row("first come, first served", fifo))
    print(row("fair queue", fair))
