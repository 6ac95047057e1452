"""Speculative decoding (Leviathan et al. 2023): tokens that may follow are proposed cheaply, and computed together in one step.

A proposed token counts where it is the very one that the sampler chooses in its place, so answers are the same with and without.
"""
