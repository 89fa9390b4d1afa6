"""What `infermesh up --deterministic` says of its cost is what was measured."""

import json
from pathlib import Path

from infermesh.cli.up import DETERMINISTIC_COST

RESULT = Path(__file__).resolve().parents[2] / "benchmarks/results/deterministic_cost.json"


def test_printed_cost_is_the_measured_one() -> None:
    streams = json.loads(RESULT.read_text())["streams"]
    one, eight, many = (f"{streams[count]['ratio']:.2f}" for count in ("1", "8", "32"))
    assert f"about {one}, {eight} and {many} of the tokens/s" in DETERMINISTIC_COST
