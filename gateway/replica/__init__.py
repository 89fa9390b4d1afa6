"""Schedulers as the gateway knows them: their state, their model, one session stream to each."""
