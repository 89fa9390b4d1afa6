"""The semantic cache: see `lookups.py` for the ladder's climb, `service.py` for the process."""
