"""The language-model engine: continuous batching over a paged KV cache. It knows nothing of serving."""
