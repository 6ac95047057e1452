"""Twice its input, row by row; `seen` is how many rows the batch had."""

import numpy as np


class Doubler:
    example = {"x": np.zeros((2, 4), np.float32)}

    def infer(self, inputs):
        x = inputs["x"]
        assert not x.flags.writeable
        return {"y": 2 * x, "seen": np.full(len(x), len(x))}
