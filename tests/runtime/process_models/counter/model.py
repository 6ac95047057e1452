"""Counts up. Writes down how far it came when it is closed."""

from pathlib import Path

import numpy as np


class Counter:
    example = {"upto": np.array([1])}

    def load(self, context):
        self.closed_at = context.parameters.get("closed_at")

    def infer(self, inputs):
        steps = 0
        try:
            for number in range(int(inputs["upto"][0])):
                steps += 1
                if number == 13:
                    raise ValueError("unlucky")
                yield {"number": np.array([number]), "ballast": np.full(inputs["ballast"][0] if "ballast" in inputs else 0, number)}
        finally:
            if self.closed_at:
                Path(self.closed_at).write_text(str(steps))
