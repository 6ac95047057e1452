"""Other servers that answer for a model, by URL: places like local replicas, called with bytes passed through."""
