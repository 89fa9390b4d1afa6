"""`python -m services.scheduler`: reads the settings and runs the process."""

import sys

from infermesh import config, lifecycle
from services.scheduler.service import SchedulerProcess


def main() -> int:
    """Returns the exit status."""
    try:
        settings = config.load(sys.argv[1:])
    except config.ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    scheduler = settings.scheduler
    return lifecycle.run(
        lambda: SchedulerProcess(scheduler), settings.telemetry, scheduler.drain_grace_s
    )


if __name__ == "__main__":
    sys.exit(main())
