"""Jobs over HTTP: one in our own words, and the faces in others'."""
