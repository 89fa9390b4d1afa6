"""The gateway's side of the semantic cache: fingerprints, lookups, replayed hits, answers to keep.

Down, slow or unsure, the cache is a miss: nothing here fails a request.
"""
