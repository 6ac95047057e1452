"""What the processes of a server do for some seconds, and what its requests wait for meanwhile."""
