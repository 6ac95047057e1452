"""LitServe: batches of up to 64 rows or 2 ms."""

import sys

import litserve
import numpy as np
from models import predictor

w, port, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


class API(litserve.LitAPI):
    def setup(self, device):
        self.model = predictor(w)

    def decode_request(self, request):
        return np.array(request["inputs"], dtype=np.float32)

    def batch(self, inputs):
        return np.concatenate(inputs)

    def predict(self, x):
        return self.model(x)

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return {"predictions": output.tolist()}


if __name__ == "__main__":
    api = API(max_batch_size=batch, batch_timeout=0.002)
    litserve.LitServer(api, accelerator="cpu", track_requests=False).run(
        host="127.0.0.1", port=port, generate_client_file=False, log_level="error"
    )
