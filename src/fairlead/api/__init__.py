"""The doors: KServe v2 over HTTP and gRPC, and operations. They translate; they decide nothing."""
