"""InferenceService over gRPC: translates, and leaves the deciding to the pipeline."""
