"""Command line of the demo model: train it, save it, measure it. `--eval-only` only measures."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    # `python demo/train.py` puts demo/ on the path, not the folder that holds it.
    sys.path[0] = str(HERE.parent)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> int:
    """Exit status 0 if at least 90 % of the held-out questions are answered right."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from demo.evaluation import evaluate, report
    from demo.training import Recipe, save, train

    arguments = _parser(Recipe().steps).parse_args()
    torch.set_num_threads(Recipe().num_threads)
    if not arguments.eval_only:
        started = time.monotonic()
        save(*train(Recipe(steps=arguments.steps)), arguments.out)
        print(f"trained and saved in {time.monotonic() - started:.0f} s")
    model = AutoModelForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    verdicts = evaluate(model, tokenizer, arguments.per_topic)
    for verdict in verdicts:
        if arguments.show_wrong and not verdict.right:
            print(f"{verdict.exchange.question!r}\n  said {verdict.answer!r}")
    print(report(verdicts))
    return 0 if sum(v.right for v in verdicts) >= 0.9 * len(verdicts) else 1


def _parser(steps: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "model", help="model directory")
    parser.add_argument("--steps", type=int, default=steps, help="training steps")
    parser.add_argument("--per-topic", type=int, default=150, help="questions asked per topic")
    parser.add_argument("--eval-only", action="store_true", help="measure the saved model")
    parser.add_argument("--show-wrong", action="store_true", help="print each wrong answer")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
