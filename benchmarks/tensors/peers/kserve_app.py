"""KServe's model server with a custom model, binary answers where the request asks for them."""

import sys

from kserve import InferOutput, InferResponse, Model, ModelServer
from models import predictor


class Server(Model):
    def __init__(self, name):
        super().__init__(name)
        self.model = predictor(name)
        self.ready = True

    def predict(self, payload, headers=None):
        y = self.model(payload.inputs[0].as_numpy())
        output = InferOutput("output", list(y.shape), "FP32")
        output.set_data_from_numpy(y, binary_data=payload.from_grpc)
        return InferResponse(
            payload.id or "1",
            self.name,
            [output],
            use_binary_outputs=payload.use_binary_outputs,
            requested_outputs=payload.request_outputs,
        )


if __name__ == "__main__":
    name, http, grpc = sys.argv[1:]
    ModelServer(http_port=int(http), grpc_port=int(grpc), enable_docs_url=False).start([Server(name)])
