"""What the administration shows of a running server."""
