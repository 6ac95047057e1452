"""The small language model of `fairlead demo`: checkpoints `chat/` and `draft/`, held-out examples and their checks."""
