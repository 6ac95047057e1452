"""KServe v2 / Open Inference Protocol: what REST and gRPC share, and REST."""
