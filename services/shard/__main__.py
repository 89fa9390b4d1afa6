"""`python -m services.shard`: one shard process."""

from __future__ import annotations

import sys

from infermesh import config, lifecycle
from infermesh.security.identities import Identity
from infermesh.security.posture import Security
from services.shard import host
from services.shard.service import ShardService


def main() -> int:
    """Reads the settings and serves until told to stop."""
    try:
        settings = config.load(sys.argv[1:])
    except config.ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    host.prepare_process()
    shard = settings.shard

    def make() -> ShardService:
        return ShardService(shard, Security.of(settings.security, Identity.SHARD))

    return lifecycle.run(make, settings.telemetry, shard.drain_grace_s)


if __name__ == "__main__":
    sys.exit(main())
