"""BentoML: one batched endpoint on NumPy arrays, its batcher free to wait as it learns."""

import os

import bentoml
import numpy as np
from models import predictor


@bentoml.service(traffic={"timeout": 60, "max_concurrency": 512}, logging={"access": {"enabled": False}})
class Server:
    def __init__(self):
        self.model = predictor(os.environ["W"])

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=60000)
    def predict(self, inputs: np.ndarray) -> np.ndarray:
        return self.model(np.asarray(inputs, dtype=np.float32))
