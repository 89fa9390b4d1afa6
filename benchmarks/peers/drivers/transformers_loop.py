"""`transformers.generate` in static batches, in process: `python -m … MODEL_FOLDER DTYPE`.

A batch is as many prompts as there are streams; the next begins when all of it has ended.
"""

import sys
import time
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.peers.drivers.lines import ClosedLoop, Loaded, answer_requests

# There torch is many times slower in bfloat16 than in the float32 that it widens weights to.
WITHOUT_BFLOAT16 = ("DEFAULT", "AVX2")


def load() -> Loaded:
    """The model and its float type are the arguments."""
    folder, dtype = sys.argv[1:]
    if dtype == "bfloat16" and torch.backends.cpu.get_cpu_capability() in WITHOUT_BFLOAT16:
        dtype = "float32"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    facts = {
        "transformers": version("transformers"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
    }
    return facts, Batches(model).run


class Batches:
    """One model."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def run(self, loop: ClosedLoop) -> None:
        """Batch by batch."""
        while begun := loop.begin_due():
            prompts = torch.tensor([prompt for prompt, _ in begun])
            times: list[float] = []

            def note(token_ids: Any, *_: Any, times: list[float] = times, **__: Any) -> Any:
                times.append(time.perf_counter())
                return torch.zeros(len(token_ids), dtype=torch.bool)

            with torch.inference_mode():
                self._model.generate(
                    prompts,
                    attention_mask=torch.ones_like(prompts),
                    max_new_tokens=loop.output_tokens,
                    do_sample=False,
                    pad_token_id=0,
                    eos_token_id=None,
                    stopping_criteria=[note],
                )
            for _, timeline in begun:
                timeline.chunks_s = times
                loop.end(timeline)


if __name__ == "__main__":
    answer_requests(load)
