"""One replica of one model: queue, fairness, KV block accounting, step plans. Imports no torch."""
