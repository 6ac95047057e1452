"""Is never done loading."""

import time


class Slow:
    example = {"x": [0]}

    def load(self, context):
        time.sleep(3600)

    def infer(self, inputs):
        return inputs
