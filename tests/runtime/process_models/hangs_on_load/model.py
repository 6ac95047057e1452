"""Is never done loading."""

import time
from pathlib import Path


class Slow:
    example = {"x": [0]}

    def load(self, context):
        if "began" in context.parameters:
            Path(context.parameters["began"]).write_text("loading")
        time.sleep(3600)

    def infer(self, inputs):
        return inputs
