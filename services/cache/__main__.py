"""`python -m services.cache`: reads the settings and runs the process."""

import sys

from infermesh import config, lifecycle
from infermesh.security.identities import Identity
from infermesh.security.posture import Security
from services.cache.service import CacheService


def main() -> int:
    """Returns the exit status."""
    try:
        settings = config.load(sys.argv[1:])
    except config.ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    cache = settings.cache

    def make() -> CacheService:
        return CacheService(cache, Security.of(settings.security, Identity.CACHE))

    return lifecycle.run(make, settings.telemetry, cache.drain_grace_s)


if __name__ == "__main__":
    sys.exit(main())
