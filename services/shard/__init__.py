"""One device's part of a model: weights, KV blocks, attention and sampling, behind ShardService."""
