"""Sets peers up ahead of a comparison: `python -m benchmarks.peers --help`."""

import argparse
import time

from benchmarks.peers.every import PEERS
from benchmarks.peers.peer import PRECISIONS


def main() -> None:
    """One after another; what is there already is left as it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    flags = parser.parse_args()
    for name in flags.peers:
        peer = PEERS[name]
        for precision in (one for one in flags.precision if one in peer.precisions):
            began = time.monotonic()
            peer.set_up(precision)
            print(f"{name} {precision}: ready after {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
