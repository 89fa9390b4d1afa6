"""Replaces modules of transformers' models by ours, found by what they do, not by their names."""
