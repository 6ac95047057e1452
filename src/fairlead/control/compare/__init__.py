"""Two answers to one request, compared by what they are. Each file holds what is kept of one kind: it adds up, and becomes JSON."""
