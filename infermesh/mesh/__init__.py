"""A whole mesh on this machine: which processes, in which order, supervised."""
