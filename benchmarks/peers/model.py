"""The one model directory that every contestant serves or converts: a known shape, random weights.

Greedy answers must be text, token by token, or a server would hold chunks back and its times say
nothing. So the rows of the embedding (which is the output layer too) of ids that are no text are
made small: they are never the likeliest, and cost what all others do.
"""

from pathlib import Path

from benchmarks.peers.environment import HOME, made_once
from benchmarks.shapes import VOCAB, make_shape

SHAPE = "qwen2.5-0.5b"
# EOS and single bytes come first, then what was merged; above the tokenizer's there is nothing.
TEXT_IDS = (300, VOCAB - 100)


def model_directory() -> Path:
    """Makes it at the first call: about 1 GB of bfloat16 weights."""
    return made_once(HOME / "models", SHAPE, _write) / SHAPE


def _write(folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    target = make_shape(SHAPE, folder)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(target)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[: TEXT_IDS[0]] *= 0.01
        rows[TEXT_IDS[1] :] *= 0.01
    model.save_pretrained(target)
