"""Owns the training loop: packed rows, masked loss, optimizers and the saved model directory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.corpus import conversation
from demo.tokenization import MAX_LENGTH, encode_conversation, learn_tokenizer

TOKENIZER_CONVERSATIONS = 20_000
TOKENS_PER_STEP = 4096
# Most rows are short, so that many conversations start at position 0; one step in five trains
# beyond position 1000, behind a system prompt of several hundred tokens.
ROW_LENGTHS = (128, 256, 128, 256, 1024)
LONG_ROW = 1024


@dataclass(frozen=True, slots=True)
class Recipe:
    """What determines the weights, given torch's version and the machine's arithmetic."""

    seed: int = 20
    steps: int = 1600
    learning_rate: float = 3e-3
    warmup_steps: int = 60
    num_threads: int = 2


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Llama at a scale of four million parameters: 8 heads share 4 key-value heads."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attention_bias=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train(recipe: Recipe) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train tokenizer and model from nothing but the corpus and the seed."""
    torch.set_num_threads(recipe.num_threads)
    torch.manual_seed(recipe.seed)
    tokenizer = learn_tokenizer(_tokenizer_texts(recipe.seed))
    model = LlamaForCausalLM(model_config(tokenizer))
    optimizers = _optimizers(model, recipe)
    started = time.monotonic()
    for step, (token_ids, learnt) in enumerate(_batches(tokenizer, recipe)):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _schedule(step, recipe)
        loss = _loss(model, token_ids, learnt)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == recipe.steps - 1:
            elapsed_s = time.monotonic() - started
            print(
                f"step {step:5} of {recipe.steps}  loss {loss:.4f}  {elapsed_s:6.0f} s", flush=True
            )
    return model.eval(), tokenizer


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the Hugging Face layout with bfloat16 weights; `model` is rounded in place."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    # The template belongs into tokenizer_config.json: readers without transformers find it there.
    tokenizer.save_pretrained(out, save_jinja_files=False)


def _tokenizer_texts(seed: int) -> Iterator[str]:
    rng = Random(seed)
    for _ in range(TOKENIZER_CONVERSATIONS):
        for message in conversation(rng).messages:
            yield message["content"]
            yield message["role"]


def _batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Per step token ids and learnt flags, both [rows, row length]."""
    rng = Random(recipe.seed + 1)
    for step in range(recipe.steps):
        length = ROW_LENGTHS[step % len(ROW_LENGTHS)]
        rows = [_row(tokenizer, rng, length) for _ in range(TOKENS_PER_STEP // length)]
        yield torch.tensor([ids for ids, _ in rows]), torch.tensor([flags for _, flags in rows])


def _row(
    tokenizer: PreTrainedTokenizerFast, rng: Random, length: int
) -> tuple[list[int], list[bool]]:
    """Whole conversations end to end, without a mask between them: a conversation must be
    answered the same whatever stands before it, and no token of the row is padding."""
    token_ids: list[int] = []
    learnt: list[bool] = []
    while len(token_ids) < length:
        long = length == LONG_ROW and not token_ids
        ids, flags = encode_conversation(conversation(rng, long=long), tokenizer)
        token_ids += ids
        learnt += flags
    return token_ids[:length], learnt[:length]


def _loss(model: LlamaForCausalLM, token_ids: Tensor, learnt: Tensor) -> Tensor:
    """Mean cross-entropy over the tokens of answers; only those are projected to logits."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(token_ids, use_cache=False).last_hidden_state
        predicts = learnt[:, 1:]
        logits = model.lm_head(hidden[:, :-1][predicts])
    return functional.cross_entropy(logits.float(), token_ids[:, 1:][predicts])


def _optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, where it needs about half AdamW's steps; AdamW
    for embeddings and norms, for which Muon is not meant."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inner = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inner]
    return [
        torch.optim.Muon(
            matrices, lr=recipe.learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _schedule(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then linear decay to zero."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    return (recipe.steps - step) / (recipe.steps - recipe.warmup_steps)
