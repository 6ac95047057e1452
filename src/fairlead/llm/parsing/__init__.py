"""From what a model writes to reasoning, answer and calls of tools: formats as data, and one parser that streams."""
