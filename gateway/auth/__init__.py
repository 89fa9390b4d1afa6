"""The gateway's side of auth: verified keys, quota spent locally, usage spooled."""
