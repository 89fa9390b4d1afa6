"""What quantized weights save and cost: memory, accuracy, perplexity, divergence, tokens/s.

Engines of one process, without a mesh around them: float32, int8 and int4 of one model take turns.
The demo model answers held-out questions, teacher-forced: an answer is right if each of its tokens
is the likeliest after those before it, which is what greedy decoding needs. Of the other shapes,
whose weights are random, it measures memory, divergence and speed.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from benchmarks.local_mesh import ROOT
from benchmarks.machine import describe, keep
from benchmarks.paired import paired_ratio
from benchmarks.shapes import SHAPES, VOCAB, make_shape
from demo.corpus import held_out_exchanges
from demo.evaluation import EVALUATION_SEED
from infermesh.config import ShardConfig
from services.shard import host
from services.shard.batch import pack
from services.shard.domain import LoadSpec, NewSequence, Sampling, Slot
from services.shard.loading import load_model
from services.shard.slots import ActiveRow, SequenceState

SCHEMES = ("", "int8", "int4")
BLOCK = 16
BLOCKS_PER_SEQUENCE = 20
BATCH = 32
DECODE_ROWS = (1, 8, 32)
PREFILL_TOKENS = 256
CONTEXT = 64
TABLES = np.arange(BATCH * BLOCKS_PER_SEQUENCE).reshape(BATCH, BLOCKS_PER_SEQUENCE)


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids of a question as the model reads it, and of what has to follow."""

    prompt: Sequence[int]
    answer: Sequence[int]


def load(model: Path, scheme: str, load_format: str) -> Any:
    """The loaded model of a shard."""
    spec = LoadSpec(
        str(model),
        dtype="float32",
        load_format=load_format,
        quantize=scheme,
        block_size=BLOCK,
        num_blocks=BATCH * BLOCKS_PER_SEQUENCE,
        max_num_seqs=BATCH,
    )
    return load_model(spec, ShardConfig(device="cpu"), lambda progress: None)


def row(slot: int, start: int, token_ids: Sequence[int]) -> ActiveRow:
    """Tokens of one sequence, sampled greedily after the last."""
    new = NewSequence(Slot(slot), (), start, 1, 0, Sampling(temperature=0.0))
    return ActiveRow(slot, SequenceState(new, start, 0, None), token_ids, start, True)


def log_probs(model: Any, texts: Sequence[Text]) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(text, place in its answer, log-probabilities there), all texts together, token by token."""
    for place in range(max(len(text.answer) for text in texts)):
        rows, slots = [], []
        for slot, text in enumerate(texts):
            if place < len(text.answer):
                start = len(text.prompt) + place - 1
                fed = text.prompt if place == 0 else [text.answer[place - 1]]
                rows.append(row(slot, 0 if place == 0 else start, fed))
                slots.append(slot)
        batch = pack(rows, TABLES, BLOCK)
        with torch.inference_mode():
            logits = model.engine._forward.logits(batch).float().log_softmax(-1)
        for index, packed in enumerate(batch.sampled):
            yield slots[batch.order[packed]], place, logits[index]


def quality(models: dict[str, Any], texts: Sequence[Text]) -> dict[str, dict[str, float]]:
    """Per scheme: exact answers, perplexity of the answers, divergence from float32, agreement."""
    found: dict[str, dict[str, float]] = {}
    plain: dict[tuple[int, int], torch.Tensor] = {}
    for scheme, model in models.items():
        loss = divergence = 0.0
        agreed = count = 0
        wrong = set()
        for first in range(0, len(texts), BATCH):
            part = texts[first : first + BATCH]
            for index, place, got in log_probs(model, part):
                token = part[index].answer[place]
                base = plain.setdefault((first + index, place), got)
                loss -= float(got[token])
                divergence += float((base.exp() * (base - got)).sum())
                agreed += int(got.argmax() == base.argmax())
                count += 1
                if int(got.argmax()) != token:
                    wrong.add(first + index)
        found[scheme or "float32"] = {
            "exact_answers": 1 - len(wrong) / len(texts),
            "perplexity": math.exp(loss / count),
            "kl_from_float32": divergence / count,
            "greedy_agreement": agreed / count,
            "tokens": count,
        }
    return found


def demo_texts(per_topic: int) -> list[Text]:
    """Held-out questions of the demo model with their right answers."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo" / "model")
    texts = []
    for exchange in held_out_exchanges(EVALUATION_SEED, per_topic):
        chat = [{"role": "user", "content": exchange.question}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        answer = f"{exchange.answer}{tokenizer.eos_token}"
        texts.append(Text(tokenizer.encode(prompt), tokenizer.encode(answer)))
    return texts


def random_texts(count: int) -> list[Text]:
    """Noise, for models of noise."""
    draw = np.random.default_rng(0)
    ids = draw.integers(300, VOCAB - 100, (count, 40)).tolist()
    return [Text(one[:24], one[24:]) for one in ids]


def speed(models: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """Tokens/s of whole steps, sampling included; the contestants alternate within each round."""
    cases = [(f"decode {n}", [row(i, CONTEXT, [300 + i]) for i in range(n)]) for n in DECODE_ROWS]
    prompt = [300 + i for i in range(PREFILL_TOKENS)]
    cases.append((f"prefill {PREFILL_TOKENS}", [row(0, 0, prompt)]))
    found = []
    for name, rows in cases:
        num_tokens = sum(one.num_tokens for one in rows)
        rates: dict[str, list[float]] = {scheme or "float32": [] for scheme in models}
        for number in range(rounds + 1):
            for scheme, model in models.items():
                began = time.perf_counter()
                model.engine.compute(rows, TABLES)
                if number:  # the first warms up
                    took = time.perf_counter() - began
                    rates[scheme or "float32"].append(num_tokens / took)
        ratios = {
            scheme: paired_ratio(list(zip(rates[scheme], rates["float32"], strict=True)))
            for scheme in rates
            if scheme != "float32"
        }
        found.append(
            {
                "case": name,
                "tokens_per_s": {k: round(statistics.median(v), 1) for k, v in rates.items()},
                "ratio_to_float32": {
                    k: {"median": r.median, "low": r.low, "high": r.high} for k, r in ratios.items()
                },
            }
        )
    return found


def measure(shape: str, folder: Path, threads: int, rounds: int, per_topic: int) -> dict[str, Any]:
    """Everything of one shape."""
    is_demo = shape == "demo"
    path = ROOT / "demo" / "model" if is_demo else make_shape(shape, folder)
    load_format = "safetensors" if is_demo else "dummy"
    models = {scheme: load(path, scheme, load_format) for scheme in SCHEMES}
    torch.set_num_threads(threads)
    return {
        "shape": shape,
        "weights": "trained" if is_demo else "random",
        "weight_bytes": {s or "float32": m.manifest.weight_bytes for s, m in models.items()},
        "quality": quality(models, demo_texts(per_topic) if is_demo else random_texts(4)),
        "speed": speed(models, rounds),
    }


def print_result(result: dict[str, Any]) -> None:
    """One line per scheme."""
    cases = [case["case"] for case in result["speed"]]
    print(f"{result['shape']} ({result['weights']} weights)")
    print(
        f"{'':8} {'MB':>7} {'exact':>6} {'ppl':>8} {'KL':>8} {'agree':>6} "
        + " ".join(f"{case + ' tok/s':>24}" for case in cases)
    )
    for scheme, size in result["weight_bytes"].items():
        held = result["quality"][scheme]
        exact = f"{held['exact_answers']:>6.1%}" if result["weights"] == "trained" else f"{'-':>6}"
        cells = []
        for case in result["speed"]:
            ratio = case["ratio_to_float32"].get(scheme)
            rest = f" ({ratio['median']:.2f}x)" if ratio else ""
            cells.append(f"{case['tokens_per_s'][scheme]:.1f}{rest}")
        print(
            f"{scheme:8} {size / 1e6:>7.1f} {exact} {held['perplexity']:>8.4g} "
            f"{held['kl_from_float32']:>8.5f} {held['greedy_agreement']:>6.1%} "
            + " ".join(f"{cell:>24}" for cell in cells)
        )


def main() -> None:
    """Parses the flags, measures, prints a table per shape, writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=("demo", *SHAPES), default=["demo"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--per-topic", type=int, default=50, help="questions of the demo model")
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    host.prepare_process()
    with tempfile.TemporaryDirectory() as folder:
        results = [
            measure(shape, Path(folder), flags.threads, flags.rounds, flags.per_topic)
            for shape in flags.shapes
        ]
    for result in results:
        print_result(result)
    keep({"machine": describe(), "threads": flags.threads, "results": results}, flags.json)


if __name__ == "__main__":
    main()
