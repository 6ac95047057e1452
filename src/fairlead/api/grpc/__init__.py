"""KServe v2 over gRPC, on an HTTP/2 protocol of our own."""
