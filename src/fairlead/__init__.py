"""Fairlead: one server for every kind of model."""

__version__ = "0.1.0"
