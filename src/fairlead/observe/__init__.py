"""Metrics, logs and request ids. Knows no other room."""
