"""Makes the virtual environment: the right torch first, then the pinned rest.

Runs under the system's Python with the standard library alone; every failure is one sentence.
"""

import argparse
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "deploy" / "constraints.txt"
TORCH = "2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SUPPORTED = ((3, 11), (3, 12), (3, 13))
DOWNLOAD = {"cpu": "about 400 MB (torch's CPU build is 190 MB of it)", "cuda": "several GB (CUDA)"}


class SetupError(Exception):
    """What went wrong and what to do, in one sentence."""


def main() -> int:
    """Parses the flags and sets up; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--accel", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dev", action="store_true", help="also what tests and linters need")
    flags = parser.parse_args()
    try:
        set_up(flags.venv, flags.accel, flags.dev)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {flags.venv} can't be made: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def set_up(folder: Path, accel: str, dev: bool) -> None:
    """Creates or completes the environment in `folder`."""
    if sys.version_info[:2] not in SUPPORTED:
        raise SetupError(
            f"Python {sys.version_info[0]}.{sys.version_info[1]} is not supported; "
            "infermesh runs on 3.11, 3.12 and 3.13 (make PYTHON=python3.13 ...)"
        )
    python = folder / "bin" / "python"
    installed = _torch_version(python) if python.exists() else ""
    is_other = bool(installed) and (accel == "cpu") != installed.endswith("+cpu")
    if not _has_pip(python) or is_other:
        print(f"Setting up {folder}: a download of {DOWNLOAD[accel]}.", flush=True)
        _create(folder)
        installed = ""
    if not installed.startswith(TORCH):
        _install_torch(python, accel)
    extras = "all,dev" if dev else "all"
    _pip(python, "the pinned dependencies", "-c", str(CONSTRAINTS), "-e", f"{ROOT}[{extras}]")
    if accel == "cpu":
        _refuse_cuda_packages(python)


def _create(folder: Path) -> None:
    """An empty environment, in place of what is there; nothing is left of one that failed."""
    try:
        venv.create(folder, with_pip=True, clear=True)
    except subprocess.CalledProcessError:
        shutil.rmtree(folder, ignore_errors=True)
        raise SetupError(
            "Python can't make a virtual environment here; on Debian and Ubuntu: "
            "apt install python3-venv"
        ) from None


def _has_pip(python: Path) -> bool:
    return (
        python.exists()
        and not subprocess.run(
            [python, "-m", "pip", "--version"], capture_output=True, check=False
        ).returncode
    )


def _torch_version(python: Path) -> str:
    """Of the installed torch; empty where there is none."""
    code = "from importlib.metadata import version as v; print(v('torch'))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def _install_torch(python: Path, accel: str) -> None:
    if accel == "cuda":
        _pip(python, "torch with CUDA", f"torch=={TORCH}")
        return
    # The exact local version: no index may answer it with a CUDA build.
    wanted = f"torch=={TORCH}+cpu"
    if _reachable(TORCH_CPU_INDEX):
        _pip(python, "torch for CPU", "--index-url", TORCH_CPU_INDEX, wanted)
        return
    try:
        _pip(python, "torch for CPU", wanted)
    except SetupError:
        raise SetupError(
            f"no CPU build of torch {TORCH} can be had: {TORCH_CPU_INDEX} is out of reach and the "
            "configured package indexes have none; make setup ACCEL=cuda takes the CUDA build"
        ) from None


def _reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/torch/", timeout=3):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _pip(python: Path, what: str, *arguments: str) -> None:
    print(f"Installing {what} ...", flush=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, *arguments], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")]
        reason = (errors or lines or ["pip failed"])[-1].removeprefix("ERROR: ")
        raise SetupError(f"installing {what} failed: {reason}")


def _refuse_cuda_packages(python: Path) -> None:
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"],
        capture_output=True,
        text=True,
        check=True,
    )
    cuda = [line for line in listed.stdout.splitlines() if line.startswith("nvidia-")]
    if cuda:
        raise SetupError(f"the CPU set-up ended with {cuda[0]}; remove .venv and run it again")


if __name__ == "__main__":
    sys.exit(main())
