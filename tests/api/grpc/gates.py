"""Where tests and the models that they serve in threads of the same process meet."""

import asyncio
import threading


class Gates:
    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()


GATES = Gates()


def close_gates() -> Gates:
    """Fresh gates, all closed."""
    GATES.__init__()  # type: ignore[misc]
    return GATES


async def reached(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 10)
