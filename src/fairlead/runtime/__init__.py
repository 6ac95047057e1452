"""Repository, batcher, instances, replica processes and the wire between them."""
