"""The mesh's tax: output tokens/s of the whole mesh through HTTP ÷ of its engine in a loop alone.

Both plan, batch and compute alike, on the same weights; they take turns, one loaded at a time. The
bar is at least 0.95 at 1, 8 and 32 streams.
"""

import argparse
from pathlib import Path

from benchmarks import tables
from benchmarks.compare import Comparison, Plan
from benchmarks.peers.infermesh import ENGINE, MESH
from benchmarks.peers.peer import PRECISIONS


def main() -> None:
    """Measures, prints, writes JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--waves", type=int, default=2, help="requests per stream and round")
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    plan = Plan(flags.precision, tuple(flags.streams), flags.rounds, flags.waves)
    print(tables.markdown(Comparison([MESH, ENGINE], plan).run(flags.json)))


if __name__ == "__main__":
    main()
