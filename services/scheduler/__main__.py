"""`python -m services.scheduler`: reads the settings and runs the process."""

import sys

from infermesh import config, lifecycle
from infermesh.security.identities import Identity
from infermesh.security.posture import Security
from services.scheduler.service import SchedulerProcess


def main() -> int:
    """Returns the exit status."""
    try:
        settings = config.load(sys.argv[1:])
    except config.ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    scheduler = settings.scheduler

    def make() -> SchedulerProcess:
        return SchedulerProcess(scheduler, Security.of(settings.security, Identity.SCHEDULER))

    return lifecycle.run(make, settings.telemetry, scheduler.drain_grace_s)


if __name__ == "__main__":
    sys.exit(main())
