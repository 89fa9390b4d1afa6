"""`infermesh quantize`: a checkpoint of fewer bits, for meshes to come."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from infermesh.config import ConfigError
from infermesh.mesh.models import ROOT


def quantize(
    model: Annotated[str, typer.Argument(help="A directory or ORG/NAME[@revision].")],
    out: Annotated[Path, typer.Option(help="The folder to write; a new or empty one.")],
    scheme: Annotated[str, typer.Option(help="int8 or int4.")] = "int8",
) -> None:
    """Write a quantized checkpoint, which `infermesh up --model OUT` serves."""
    if not (ROOT / "services" / "shard").is_dir():
        raise ConfigError("infermesh quantize needs a checkout: the wheel has the client only")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # torch is the shard's: this process never imports it
    done = subprocess.run(
        [
            *(sys.executable, "-m", "services.shard.quantize", model),
            *("--out", str(out), "--scheme", scheme),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    raise typer.Exit(done.returncode)
