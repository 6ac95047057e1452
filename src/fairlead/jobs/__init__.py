"""Requests that are stored and answered later: their runner, their files, and the calls that tell of them."""
