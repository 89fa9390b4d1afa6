"""Which models a mesh serves, under which names, from what the user typed. Starts nothing."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from infermesh.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "demo" / "model"
DEMO_MODEL_ID = "infermesh-demo"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """One model: an absolute path or ORG/NAME[@revision], and the name clients ask for."""

    source: str
    name: str


def choose_models(models: Sequence[str], served_names: Sequence[str]) -> tuple[ModelChoice, ...]:
    """The models of `--model [NAME=]MODEL ...`; none means the demo model.

    Args:
        served_names: of `--served-name`; none, or one for each model in their order.

    Raises:
        ConfigError: there is no such model, or two would have the same name.
    """
    texts = list(models) or [""]
    if served_names and len(served_names) != len(texts):
        raise ConfigError(
            f"--served-name is there {len(served_names)} times for {len(texts)} models; give one "
            "for each, in the order of --model, or write --model NAME=MODEL"
        )
    chosen: dict[str, ModelChoice] = {}
    for text, served in zip(texts, served_names or [""] * len(texts), strict=True):
        choice = find_model(text)
        choice = ModelChoice(choice.source, served or choice.name)
        if choice.name in chosen:
            raise ConfigError(
                f"two models would be served as {choice.name}; name them apart with "
                "--model NAME=MODEL"
            )
        chosen[choice.name] = choice
    return tuple(chosen.values())


def find_model(text: str) -> ModelChoice:
    """One `[NAME=]MODEL`: a directory or ORG/NAME; empty means the demo model.

    Raises:
        ConfigError: neither a directory with a config.json nor ORG/NAME.
    """
    if not text:
        return ModelChoice(str(DEMO_MODEL), DEMO_MODEL_ID)
    path = Path(text).expanduser()
    name, equals, model = text.partition("=")
    if equals and not path.is_dir():
        if not (name and model):
            raise ConfigError(f"--model is {text!r}; it must be MODEL or NAME=MODEL")
        return ModelChoice(find_model(model).source, name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{text} is no model directory: it has no config.json")
        return ModelChoice(str(path.resolve()), path.resolve().name)
    if _HUB_NAME.fullmatch(text) and not text.startswith("."):
        return ModelChoice(text, text.partition("@")[0])
    raise ConfigError(f"there is no model at {text}: give a directory or ORG/NAME")


def check_aliases(aliases: Sequence[str], models: Sequence[ModelChoice]) -> None:
    """Raises ConfigError for an `alias=model` that names no model of this mesh, or hides one."""
    names = [choice.name for choice in models]
    for pair in aliases:
        alias, _, target = pair.partition("=")
        if not alias or target not in names:
            raise ConfigError(
                f"alias {pair!r} must be ALIAS=MODEL with a model of this mesh: {', '.join(names)}"
            )
        if alias in names:
            raise ConfigError(f"alias {pair!r} hides the model of that name")
