"""The scheduler of one replica: see `batcher.py` for the engine, `service.py` for the process."""
