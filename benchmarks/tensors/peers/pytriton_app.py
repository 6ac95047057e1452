"""pytriton: tritonserver in front, the function in this process behind pytriton's proxy backend."""

import os
import sys
import sysconfig

import numpy as np
from models import COLUMNS, SHAPES, predictor
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

w, http, grpc, metrics, size = sys.argv[1], *map(int, sys.argv[2:])
model = predictor(w)
os.environ["LD_LIBRARY_PATH"] = sysconfig.get_config_var("LIBDIR")  # Triton's Python stub must find this libpython


@batch
def infer(input):
    return {"output": model(input)}


if __name__ == "__main__":
    config = TritonConfig(http_address="127.0.0.1", http_port=http, grpc_address="127.0.0.1", grpc_port=grpc, metrics_port=metrics)
    with Triton(config=config) as triton:
        triton.bind(
            model_name=w,
            infer_func=infer,
            inputs=[Tensor(name="input", dtype=np.float32, shape=SHAPES[w])],
            outputs=[Tensor(name="output", dtype=np.float32, shape=(COLUMNS[w],))],
            config=ModelConfig(max_batch_size=size, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
        )
        triton.serve()
