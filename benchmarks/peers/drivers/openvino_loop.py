"""OpenVINO GenAI's continuous batching, asked in process: `python -m … MODEL_FOLDER`.

Greedy; every answer has all of its tokens.
"""

import sys
import time
from typing import Any

import numpy as np
import openvino
import openvino_genai

from benchmarks.peers.drivers.lines import ClosedLoop, Loaded, Timeline, answer_requests

# For two cores.
SCHEDULER = {
    "cache_size": 1,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 64,
    "dynamic_split_fuse": True,
    "enable_prefix_caching": False,
}
PROPERTIES = {"INFERENCE_NUM_THREADS": 2}


def load() -> Loaded:
    """The pipeline of the folder named by the arguments."""
    scheduler = openvino_genai.SchedulerConfig()
    for name, value in SCHEDULER.items():
        setattr(scheduler, name, value)
    pipeline = openvino_genai.ContinuousBatchingPipeline(sys.argv[1], scheduler, "CPU", PROPERTIES)
    facts = {
        "version": openvino_genai.get_version(),
        "scheduler": SCHEDULER,
        "properties": PROPERTIES,
    }
    return facts, Loop(pipeline).run


class Loop:
    """One pipeline; its requests are numbered on."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._num_begun = 0

    def run(self, loop: ClosedLoop) -> None:
        """Steps until every prompt is answered."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = loop.output_tokens
        config.ignore_eos = True
        config.do_sample = False
        active: list[tuple[Any, Timeline]] = []
        while not loop.is_over:
            for prompt, timeline in loop.begin_due():
                token_ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
                handle = self._pipeline.add_request(self._num_begun, token_ids, config)
                self._num_begun += 1
                active.append((handle, timeline))
            self._pipeline.step()
            active = [one for one in active if not _take(loop, *one)]


def _take(loop: ClosedLoop, handle: Any, timeline: Timeline) -> bool:
    """Notes the tokens of the last step; whether they were the last ones."""
    while handle.can_read():
        for output in handle.read().values():
            timeline.chunks_s += [time.perf_counter()] * len(output.generated_ids)
    if handle.get_status() == openvino_genai.GenerationStatus.RUNNING:
        return False
    loop.end(timeline)
    return True


if __name__ == "__main__":
    answer_requests(load)
