"""Loops that run in a peer's own environment: the standard library and the peer, nothing else."""
