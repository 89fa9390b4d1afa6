"""Packed weights kept on disk: a restart, and a second replica beside the first, map them instead
of reading, quantizing and packing the checkpoint again. ADR 28."""
