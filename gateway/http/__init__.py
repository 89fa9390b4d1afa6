"""OpenAI's HTTP API and the admin port: translates, and leaves the deciding to the pipeline."""
