"""From what the operator named to a directory on this machine: a path, or a model on the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from infermesh.errors import InvalidRequest, ModelLoadFailed

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
_WEIGHTS = ("*.safetensors",)
# The same weights again, as their authors' own libraries read them.
_COPIES = ("consolidated*", "original/*")
_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Source:
    """A model directory, and the name it came by."""

    directory: Path
    # A path, or ORG/NAME@revision.
    name: str
    # What clients call it where nothing else is configured.
    default_model_id: str


def resolve(model: str, *, with_weights: bool) -> Source:
    """Finds the directory, downloading from the hub where `model` is ORG/NAME[@revision].

    Raises:
        InvalidRequest: `model` is empty.
        ModelLoadFailed: there is no such directory, or the hub can't give it.
    """
    if not model:
        raise InvalidRequest("model is empty: name a directory or ORG/NAME", param="model")
    path = Path(model).expanduser()
    if path.is_dir():
        return Source(path, str(path), path.resolve().name)
    if path.is_absolute() or model.startswith((".", "~")) or not _HUB_NAME.fullmatch(model):
        raise ModelLoadFailed(f"{model} is not a directory, nor ORG/NAME of a model on the hub")
    # A snapshot's folder is named by its commit.
    directory = download(model, with_weights=with_weights)
    name = model.partition("@")[0]
    return Source(directory, f"{name}@{directory.name}", name)


def download(model: str, *, with_weights: bool, into: Path | None = None) -> Path:
    """The folder with a model of the hub, ORG/NAME[@revision].

    Args:
        into: where its files go, which need no cache then; None: the hub's own cache.

    Raises:
        ModelLoadFailed: why the hub can't give it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    name, _, revision = model.partition("@")
    patterns = [*FILES, *(_WEIGHTS if with_weights else ())]
    try:
        directory = snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=patterns,
            ignore_patterns=list(_COPIES),
            etag_timeout=_TIMEOUT_S,
            local_dir=into,
        )
    except GatedRepoError as exc:
        raise ModelLoadFailed(f"{name} is gated: accept its terms and log in to the hub") from exc
    except RevisionNotFoundError as exc:
        raise ModelLoadFailed(f"{name} has no revision {revision!r}") from exc
    except RepositoryNotFoundError as exc:
        raise ModelLoadFailed(
            f"{name} is neither a directory nor a model that the hub shows to this account"
        ) from exc
    except LocalEntryNotFoundError as exc:
        raise ModelLoadFailed(
            f"{name} is not a directory, not in the local hub cache, and the hub is out of reach"
        ) from exc
    except Exception as exc:  # the hub's client raises its HTTP library's errors, which vary
        raise ModelLoadFailed(f"{name} could not be downloaded: {type(exc).__name__}") from exc
    return Path(directory)
