"""Measurements: each prints a table and writes JSON that names commit and machine."""
