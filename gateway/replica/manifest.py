"""Fetches a replica's manifest with its tokenizer files and makes the served model of them."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from gateway.request import Fingerprint
from gateway.served_model import ServedModel, parse_config, sampling_defaults
from gateway.text.tokenizer import ModelText
from infermesh.errors import MeshError, ModelLoadFailed
from infermesh.v1 import model_pb2
from infermesh.v1 import scheduler_service_pb2 as pb

if TYPE_CHECKING:  # the type of the asyncio stub exists in the stubs alone
    from infermesh.v1.scheduler_service_pb2_grpc import SchedulerServiceAsyncStub

FETCH_TIMEOUT_S = 60.0
_TOKENIZER = "tokenizer.json"


async def fetch_model(
    stub: "SchedulerServiceAsyncStub", threads: ThreadPoolExecutor
) -> ServedModel:
    """The model that the replica serves.

    Raises:
        grpc.aio.AioRpcError: the call failed.
        ModelLoadFailed: the files it sent make no tokenizer or template.
    """
    manifest: model_pb2.ModelManifest | None = None
    files: dict[str, bytearray] = {}
    request = pb.SchedulerServiceGetModelRequest()
    async for part in stub.GetModel(request, timeout=FETCH_TIMEOUT_S):
        if part.HasField("manifest"):
            manifest = part.manifest
        else:
            files.setdefault(part.file.name, bytearray()).extend(part.file.data)
    if manifest is None or _TOKENIZER not in files:
        raise ModelLoadFailed("the replica sent no manifest, or no tokenizer.json with it")
    loop = asyncio.get_running_loop()
    tokenizer_json = bytes(files[_TOKENIZER])
    return await loop.run_in_executor(threads, make_model, manifest, tokenizer_json, threads)


def make_model(
    manifest: model_pb2.ModelManifest, tokenizer_json: bytes, threads: ThreadPoolExecutor
) -> ServedModel:
    """Reads the files; takes up to seconds for a large vocabulary.

    Raises:
        ModelLoadFailed: they can't be read.
    """
    try:
        text = ModelText(
            manifest.model_id,
            tokenizer_json,
            parse_config(manifest.tokenizer_config_json),
            manifest.chat_template,
            threads,
        )
        defaults = sampling_defaults(manifest.generation_config_json)
    except MeshError:
        raise
    except Exception as exc:  # tokenizers and Jinja share no base class for what they can't read
        raise ModelLoadFailed(
            f"the tokenizer files of {manifest.model_id} can't be read: {exc}"
        ) from exc
    return ServedModel(
        model_id=manifest.model_id,
        fingerprint=Fingerprint(manifest.model_fingerprint),
        architecture=manifest.architecture,
        dtype=manifest.dtype,
        max_model_len=manifest.max_model_len,
        vocab_size=manifest.vocab_size,
        eos_token_ids=frozenset(manifest.eos_token_ids),
        created_unix_s=manifest.created_unix_s,
        defaults=defaults,
        text=text,
        rope_switch_len=manifest.rope_switch_len,
        quantization=manifest.quantization,
    )
