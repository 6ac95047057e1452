"""Write each workload's request body in every encoding (base environment).

NAME.json     the Open Inference Protocol's JSON
NAME.bin      its header in JSON, then the raw tensor (the binary extension); NAME.header: the header's length
NAME.grpc     one length-prefixed ModelInferRequest
NAME.native   {"inputs": rows}, for servers with a route of their own
NAME.want     the expected answer, float32
w1.proba.*    the same for servers that answer probabilities only when asked for the output `predict_proba`
"""

import json
import struct

import numpy as np
from models import MODELS, SHAPES, predictor, row
from tritonclient.grpc import service_pb2

PAYLOADS = MODELS.parent / "payloads"


def compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def bodies(workload: str, named: str = "") -> dict[str, bytes]:
    """The request by encoding. Outputs are named where they must be: `named`, and to ask for a binary answer."""
    x = row(workload)
    values = [round(v, 4) for v in x.ravel().tolist()]  # the shortest JSON a client could send
    tensor = {"name": "input", "shape": list(x.shape), "datatype": "FP32"}
    plain = {"inputs": [{**tensor, "data": values}]} | ({"outputs": [{"name": named}]} if named else {})
    binary = {
        "inputs": [{**tensor, "parameters": {"binary_data_size": x.nbytes}}],
        "outputs": [{"name": named or "output", "parameters": {"binary_data": True}}],
    }
    request = service_pb2.ModelInferRequest(model_name=workload, raw_input_contents=[x.tobytes()])
    request.inputs.add(name="input", datatype="FP32", shape=x.shape)
    if named:
        request.outputs.add(name=named)
    message = request.SerializeToString()
    return {
        "json": compact(plain),
        "bin": compact(binary) + x.tobytes(),
        "header": str(len(compact(binary))).encode(),
        "grpc": struct.pack(">BI", 0, len(message)) + message,
        "native": compact({"inputs": np.array(values).reshape(x.shape).tolist()}),
        "want": predictor(workload)(x).astype(np.float32).tobytes(),
    }


if __name__ == "__main__":
    PAYLOADS.mkdir(exist_ok=True)
    for workload in SHAPES:
        for name, body in bodies(workload).items():
            (PAYLOADS / f"{workload}.{name}").write_bytes(body)
    for name, body in bodies("w1", named="predict_proba").items():
        (PAYLOADS / f"w1.proba.{name}").write_bytes(body)
