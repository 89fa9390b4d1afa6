"""What limits a mesh now: its metrics at two moments, and one sentence about the difference.

`scrape` reads, `policy` decides.
"""

from infermesh.diagnosis.policy import Finding, Limit, diagnose
from infermesh.diagnosis.scrape import Process, Scrape, parse

__all__ = ["Finding", "Limit", "Process", "Scrape", "diagnose", "parse"]
