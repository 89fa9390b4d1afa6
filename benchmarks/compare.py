"""infermesh beside its peers: the same weights and prompts, one loaded at a time, by turns.

Every round starts each contestant once, in another order, warms it up and asks it at every number
of streams. Greedy, disjoint random prompts of token ids, all output tokens; the mesh reuses
nothing. Ratios are of pairs of one round. `python -m benchmarks.compare --help` for the flags.
"""

import argparse
import contextlib
import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import bars, tables
from benchmarks.machine import describe, keep
from benchmarks.paired import paired_ratio
from benchmarks.peers.every import PEERS
from benchmarks.peers.infermesh import MESH
from benchmarks.peers.model import SHAPE, TEXT_IDS
from benchmarks.peers.peer import PRECISIONS, Peer, Running
from benchmarks.workload import Workload

WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of each contestant.

    Attributes:
        waves: requests per stream.
        resident: all stay loaded, and idle while they wait: saves their starts, wants memory.
    """

    precision: str
    streams: tuple[int, ...] = (1, 8, 32)
    rounds: int = 10
    waves: int = 2
    prompt_tokens: int = 128
    output_tokens: int = 64
    resident: bool = False

    def workload(self, number: int, streams: int) -> Workload:
        """Equal for all contestants of a round, and of no other."""
        return Workload(
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            vocab=TEXT_IDS,
            temperature=0.0,
            seed=1000 * number + streams,
        )


class Comparison:
    """Contestants that take turns; ratios are of the first to each other one.

    Another one that can't be set up or fails is left out from then on, and named with its message.
    """

    def __init__(self, contestants: Sequence[Peer], plan: Plan) -> None:
        self._plan = plan
        self._first = contestants[0]
        self._taking_part = {peer.name: peer for peer in contestants}
        self._failed: dict[str, str] = {}
        self._facts: dict[str, Any] = {}
        self._runs: list[dict[str, Any]] = []

    def run(self, to_json: Path | None = None) -> dict[str, Any]:
        """All rounds; what there is is written after each."""
        for peer in list(self._taking_part.values()):
            with self._leaving_out(peer):
                peer.set_up(self._plan.precision)
        with contextlib.ExitStack() as all_loaded:
            loaded: dict[str, Running] = {}
            for peer in list(self._taking_part.values()) if self._plan.resident else ():
                with self._leaving_out(peer):
                    loaded[peer.name] = all_loaded.enter_context(peer.running(self._plan.precision))
            for number in range(self._plan.rounds):
                self._round(number, loaded)
                keep(self.result(), to_json)
        return self.result()

    def _round(self, number: int, loaded: Mapping[str, Running]) -> None:
        peers = list(self._taking_part.values())
        first = number % len(peers)
        for peer in (*peers[first:], *peers[:first]):
            with self._leaving_out(peer), contextlib.ExitStack() as turn:
                running = loaded.get(peer.name)
                if running is None:
                    running = turn.enter_context(peer.running(self._plan.precision))
                self._facts[peer.name] = running.facts()
                self._runs += measure(peer.name, running, self._plan, number)

    @contextlib.contextmanager
    def _leaving_out(self, peer: Peer) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError) as error:
            if peer is self._first:
                raise
            print(f"{peer.name} is left out: {error}", flush=True)
            self._failed[peer.name] = str(error)
            del self._taking_part[peer.name]

    def result(self) -> dict[str, Any]:
        """Of the rounds that are complete."""
        names = list(self._taking_part)
        num_complete = min(
            sum(run["contestant"] == name for run in self._runs) // len(self._plan.streams)
            for name in names
        )
        complete = [run for run in self._runs if run["round"] < num_complete]
        return {
            "machine": describe(),
            "shape": SHAPE,
            "plan": dataclasses.asdict(self._plan),
            "contestants": self._facts,
            "left_out": self._failed,
            **summarize(complete, names, self._plan),
            "runs": self._runs,
        }


def measure(name: str, running: Running, plan: Plan, number: int) -> list[dict[str, Any]]:
    """One contestant's turn: at each number of streams a wave to warm up, then what counts."""
    runs = []
    for streams in plan.streams:
        workload = plan.workload(number, streams)
        short = dataclasses.replace(
            workload, output_tokens=WARM_UP_TOKENS, seed=workload.seed + 500
        )
        running.measure(short, streams, requests=streams)
        report = running.measure(workload, streams, requests=streams * plan.waves)
        runs.append(
            {
                "round": number,
                "contestant": name,
                "streams": streams,
                "report": dataclasses.asdict(report),
            }
        )
        print(f"round {number + 1}, {name}, {streams}: {report.tokens_per_s} tokens/s", flush=True)
    return runs


def summarize(runs: Sequence[dict[str, Any]], names: Sequence[str], plan: Plan) -> dict[str, Any]:
    """Medians per contestant and number of streams, and the first one's ratios and bars."""
    rows: list[dict[str, Any]] = []
    verdicts: list[dict[str, Any]] = []
    for streams in plan.streams:
        reports = {
            name: [
                run["report"]
                for run in runs
                if run["contestant"] == name and run["streams"] == streams
            ]
            for name in names
        }
        for name in names:
            row = {"streams": streams, "contestant": name, **medians(reports[name])}
            if name != names[0]:
                for figure in ("tokens_per_s", "ttft_p50_ms"):
                    pairs = zip(reports[names[0]], reports[name], strict=True)
                    ratio = paired_ratio([(ours[figure], other[figure]) for ours, other in pairs])
                    row[f"{figure}_ratio"] = dataclasses.asdict(ratio)
                    verdicts += bars.judge(plan.precision, name, streams, figure, ratio)
            rows.append(row)
    return {"rows": rows, "bars": verdicts}


def medians(reports: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Over rounds."""
    figures = ("tokens_per_s", "ttft_p50_ms", "tpot_p50_ms", "itl_p99_ms")
    return {
        figure: round(statistics.median(report[figure] for report in reports), 2)
        for figure in figures
    }


def main() -> None:
    """Parses the flags, compares, prints a table; writes JSON, the table and a plot if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="default: all of that precision")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--waves", type=int, default=2, help="requests per stream and round")
    parser.add_argument("--resident", action="store_true", help="all stay loaded; wants memory")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path, help="the table")
    parser.add_argument("--svg", type=Path, help="the plot")
    flags = parser.parse_args()
    wanted = flags.peers or [n for n, p in PEERS.items() if flags.precision in p.precisions]
    peers = [PEERS[name] for name in wanted]
    for peer in peers:
        if flags.precision not in peer.precisions:
            parser.error(f"{peer.name} is compared at {', '.join(peer.precisions)}")
    plan = Plan(
        precision=flags.precision,
        streams=tuple(flags.streams),
        rounds=flags.rounds,
        waves=flags.waves,
        resident=flags.resident,
    )
    result = Comparison([MESH, *peers], plan).run(flags.json)
    print(tables.markdown(result))
    if flags.markdown is not None:
        flags.markdown.write_text(tables.markdown(result))
    if flags.svg is not None:
        flags.svg.write_text(tables.svg(result))


if __name__ == "__main__":
    main()
