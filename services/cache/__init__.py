"""The semantic cache: see `answers.py` for the ladder's climb, `service.py` for the process."""
