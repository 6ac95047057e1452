"""Anthropic's Messages API, as its SDK and the agents that are built on it speak it."""
