"""Who may ask, how much, in which order, and where it is answered: the path that every request walks."""
