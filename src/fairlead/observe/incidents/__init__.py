"""Incidents: what was to be seen while something was wrong, kept in one archive with the beginning of its post-mortem."""
