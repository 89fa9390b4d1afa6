"""What puts a model's files on a volume before the shard starts: an init container's program.

It owns the way there (hub, S3), the check of what came, and one download where several pods share
a volume. It does not read a model; the shard opens the folder as any other.
"""
