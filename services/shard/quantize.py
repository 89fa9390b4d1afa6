"""`python -m services.shard.quantize MODEL --out DIR --scheme int8`: a quantized checkpoint of a
plain one, which loads as any other. `infermesh quantize` runs it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from infermesh.errors import InvalidRequest, MeshError
from services.shard import host
from services.shard.checkpoint import read_checkpoint
from services.shard.model_files import read_model_files
from services.shard.quantization import SCHEMES, asked_scheme, stored_scheme
from services.shard.source import FILES, resolve
from services.shard.supported import check_supported


def quantize(model: str, out: Path, scheme_name: str) -> str:
    """Writes `out` and returns one sentence about it. Until all is written, it is OUT.partial.

    Raises:
        MeshError: InvalidRequest where `out` is in use or the model is quantized already; else as
            a load of the model.
    """
    scheme = asked_scheme(scheme_name)
    if scheme is None:
        raise InvalidRequest(f"scheme is empty, allowed are {', '.join(SCHEMES)}", param="scheme")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidRequest(f"{out} is there already and not an empty folder", param="out")
    source = resolve(model, with_weights=True)
    files = read_model_files(source.directory)
    check_supported(files.config)
    stored = stored_scheme(files.config)
    if stored is not None:
        raise InvalidRequest(f"{source.name} is quantized as {stored} already", param="model")
    checkpoint = read_checkpoint(source.directory)
    import torch

    from services.shard.quantized_checkpoint import Writer, write_codes
    from services.shard.skeleton import meta_model, tied_parameters

    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    writer = Writer(partial)
    skeleton = meta_model(files, torch.float32)
    try:
        write_codes(skeleton, checkpoint, tied_parameters(skeleton), scheme, writer)
        _copy_files(source.directory, partial)
        config = {**files.config, "quantization_config": scheme.config()}
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    before, after = checkpoint.num_bytes, writer.num_bytes
    return f"{out}: {scheme}, {after / 1e6:.1f} MB of weights, which were {before / 1e6:.1f} MB"


def _copy_files(source: Path, target: Path) -> None:
    """Tokenizer, chat template and the like; not the weights, nor their index."""
    for pattern in FILES:
        for file in source.glob(pattern):
            if not file.name.endswith(".safetensors.index.json"):
                shutil.copyfile(file, target / file.name)


def main() -> int:
    """Parses the flags; every failure is one sentence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a directory or ORG/NAME[@revision]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scheme", choices=tuple(SCHEMES), default="int8")
    flags = parser.parse_args()
    host.prepare_process()
    try:
        sys.stdout.write(quantize(flags.model, flags.out, flags.scheme) + "\n")
    except (MeshError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
