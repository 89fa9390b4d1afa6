"""`python -m services.auth`: reads the settings and runs the process."""

import sys

from infermesh import config, lifecycle
from infermesh.security.identities import Identity
from infermesh.security.posture import Security
from services.auth.service import AuthProcess


def main() -> int:
    """Returns the exit status."""
    try:
        settings = config.load(sys.argv[1:])
    except config.ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    auth = settings.auth

    def make() -> AuthProcess:
        return AuthProcess(auth, security=Security.of(settings.security, Identity.AUTH))

    return lifecycle.run(make, settings.telemetry, auth.drain_grace_s)


if __name__ == "__main__":
    sys.exit(main())
