"""Logistic regression on flowers, and what may be wrong with a version of it: `fault` in the parameters of its spec."""

import os
import subprocess
import sys
import time

import numpy as np

LEAK_BYTES = 32 << 10


class Iris:
    example = {"x": np.zeros((1, 4), np.float32)}

    def load(self, context):
        self.fault = context.parameters.get("fault", "")
        self.kept = []
        if self.fault == "hangs on load":
            asleep = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
            pids = context.parameters["pids"]
            with open(pids + ".new", "w") as file:
                file.write(f"{os.getpid()} {asleep.pid}")
            os.replace(pids + ".new", pids)
            time.sleep(3600)
        weights = np.load(context.path / "weights.npz")
        self.w, self.b = weights["w"], weights["b"]

    def infer(self, inputs):
        x = inputs["x"]
        scores = np.exp(x @ self.w + self.b)
        scores = (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)
        match self.fault:
            case "leaks":
                self.kept += [bytearray(os.urandom(1) * LEAK_BYTES) for _ in x]
            case "slow under load" if len(x) > 1:
                time.sleep(0.1)
            case "wrong for one class":  # says "virginica" of the last quarter of what it takes for "versicolor"
                unsure = (scores.argmax(axis=1) == 1) & (x[:, 2] > 4.0)
                scores[unsure] = scores[unsure][:, [0, 2, 1]]
            case "NaN":
                scores[x[:, 2] > 5.0] = np.nan
            case "constant":
                scores[:] = (0.25, 0.5, 0.25)
            case "crashes" if x.any():
                os._exit(3)
            case "fails for giants" if x.max() > 100:
                raise ValueError("no such flower")
            case "fails":
                raise ValueError("no flowers today")
            case "flipped":
                return {"labels": scores.argmax(axis=1)}
        return {"scores": scores}
