"""Counts up, then waits for something that never comes. Writes down that it was closed."""

import asyncio
from pathlib import Path

import numpy as np


class AsyncCounter:
    example = {"upto": np.array([0])}

    def load(self, context):
        self.closed_at = context.parameters.get("closed_at")

    def note(self, text):
        if self.closed_at:
            Path(self.closed_at).write_text(text)

    async def infer(self, inputs):
        upto = int(inputs["upto"][0])
        try:
            for number in range(upto):
                await asyncio.sleep(0)
                yield {"number": np.array([number])}
            if upto:
                await asyncio.Event().wait()
        finally:
            self.note("closed")
        yield {"number": np.array([-1])}
