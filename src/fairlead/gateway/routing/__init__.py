"""Where a request goes: the version, the place that computes it, and another place when that one fails."""
