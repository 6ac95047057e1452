"""Ray Serve: one replica, batches of up to 64 rows or 2 ms."""

import os
import sys
import time

import numpy as np
import ray
from models import predictor
from ray import serve


@serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_cpus": 1})
class Server:
    def __init__(self):
        self.model = predictor(os.environ["W"])

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.002)
    async def predict(self, rows):
        return list(self.model(np.concatenate(rows)))

    async def __call__(self, request):
        body = await request.json()
        return {"predictions": [(await self.predict(np.array(body["inputs"], dtype=np.float32))).tolist()]}


if __name__ == "__main__":
    variables = {name: os.environ[name] for name in ("W", "PYTHONPATH")}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1", runtime_env={"env_vars": variables})
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Server.bind())
    while True:
        time.sleep(60)
