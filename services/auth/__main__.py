"""`python -m services.auth`: reads the settings and runs the process."""

import sys

from infermesh import config, lifecycle
from services.auth.service import AuthProcess


def main() -> int:
    """Returns the exit status."""
    try:
        settings = config.load(sys.argv[1:])
    except config.ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    auth = settings.auth
    return lifecycle.run(lambda: AuthProcess(auth), settings.telemetry, auth.drain_grace_s)


if __name__ == "__main__":
    sys.exit(main())
