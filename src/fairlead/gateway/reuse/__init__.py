"""Answers that serve more than one request: stored ones, those under way, and those to nearly the same question."""
