"""Tells what it can see of the world."""

import os
import sys

import numpy as np
import threadpoolctl

from fairlead.backends.base import requests


class Surroundings:
    batched = False
    example = {"x": [0]}

    def infer(self, inputs):
        pools = threadpoolctl.threadpool_info()
        return {
            "preloaded": ["colorsys" in sys.modules],
            "omp": [os.environ["OMP_NUM_THREADS"]],
            "blas": np.array([pool["num_threads"] for pool in pools if pool["user_api"] == "blas"]),
            "ids": [request.id for request in requests.get()],
            "traces": [request.trace for request in requests.get()],
            "tones": [request.parameters.get("tone", "") for request in requests.get()],
            "random": np.random.random(4),
            "comm": [open("/proc/self/comm").read().strip()],
        }
