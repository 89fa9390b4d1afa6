"""The public edge: OpenAI's HTTP API and gRPC in front of a mesh of replicas. Sees text; never a
weight, never a batch.
"""
