"""Cannot be loaded."""


class Broken:
    example = {"x": [0]}

    def load(self, context):
        raise FileNotFoundError("weights.bin")

    def infer(self, inputs):
        return inputs
