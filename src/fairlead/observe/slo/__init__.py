"""Objectives, their error budgets, and alerts: what they decide has the time as an argument and does nothing."""
