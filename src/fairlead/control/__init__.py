"""Registry, validation and rollouts: decides which versions there are and which one answers. Never in a request's way."""
