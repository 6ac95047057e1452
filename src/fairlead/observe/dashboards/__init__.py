"""Grafana's dashboards, made from the table of metrics, so that they cannot drift from it.

`fairlead dashboards` writes them; deploy/grafana holds the same files, and a test runs each query against a real Prometheus.
"""
