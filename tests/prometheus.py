"""promtool for tests, from Debian's package `prometheus`.

`python -m tests.prometheus` installs it where it is missing, as CI does.
"""

import os
import shutil
import subprocess


def program(name: str) -> str:
    """The path of promtool, or of another; installed with apt-get where it is missing."""
    if shutil.which(name) is None:
        install()
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(f"there is no {name}: apt-get install prometheus")
    return found


def install() -> None:
    """Debian's package; needs root."""
    if os.geteuid() != 0:
        raise RuntimeError("Prometheus is missing: apt-get install prometheus")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", "prometheus"]):
        subprocess.run(["apt-get", *command], check=True, env=environment, capture_output=True)


if __name__ == "__main__":
    print(program("promtool"))
