"""How often the semantic tier would be right on labelled pairs: cosine alone, and with the guard.

Reads SICK (SemEval 2014 task 1) and the Microsoft Research Paraphrase Corpus from a folder; they
are no part of the project. A SICK pair may share an answer only where it is an ENTAILMENT of
relatedness 4.5 or more, an MSRP pair where it is a paraphrase.
"""

import argparse
import csv
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.machine import describe, keep
from services.cache import courtesy, guard, minilm, wording
from services.cache.embedding import BUILTIN

THRESHOLDS = (0.80, 0.85, 0.90, 0.95, 0.97)
_BATCH = 64


@dataclass(frozen=True)
class Pair:
    """Two texts and whether one answer serves both."""

    left: str
    right: str
    is_same: bool
    is_opposite: bool = False


def sick(path: Path) -> Iterator[Pair]:
    """Pairs of image and video descriptions."""
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            judgment = row["entailment_judgment"].strip()
            is_same = judgment == "ENTAILMENT" and float(row["relatedness_score"]) >= 4.5
            yield Pair(row["sentence_A"], row["sentence_B"], is_same, judgment == "CONTRADICTION")


def msrp(path: Path, *, test: bool) -> Iterator[Pair]:
    """Pairs of news sentences; every fifth row is the test part."""
    with path.open(encoding="utf-8-sig") as file:
        for number, row in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)):
            if number == 0 or (number % 5 == 0) is not test:
                continue
            yield Pair(row[3], row[4], row[0] == "1")


def cosines(pairs: list[Pair]) -> list[float]:
    """Of the texts as the cache embeds them."""
    model = minilm.load(BUILTIN, "cpu", 2)
    texts = sorted({courtesy.core(text) for pair in pairs for text in (pair.left, pair.right)})
    tokens = model.tokenize(texts)
    order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
    vectors = {}
    for start in range(0, len(order), _BATCH):
        part = order[start : start + _BATCH]
        for i, vector in zip(part, model.encode([tokens[i] for i in part]), strict=True):
            vectors[texts[i]] = vector
    return [
        float(np.dot(vectors[courtesy.core(pair.left)], vectors[courtesy.core(pair.right)]))
        for pair in pairs
    ]


def score(pairs: list[Pair], near: list[float], threshold: float) -> dict[str, float | int]:
    """Precision and recall of a hit, with and without the guard."""
    above = [pair for pair, cosine in zip(pairs, near, strict=True) if cosine >= threshold]
    passed = [pair for pair in above if _passes(pair)]
    num_same = sum(pair.is_same for pair in pairs)
    return {
        "threshold": threshold,
        "hits_by_cosine": len(above),
        "precision_by_cosine": _ratio(sum(pair.is_same for pair in above), len(above)),
        "hits": len(passed),
        "precision": _ratio(sum(pair.is_same for pair in passed), len(passed)),
        "recall": _ratio(sum(pair.is_same for pair in passed), num_same),
        "guard_recall": _ratio(
            sum(pair.is_same for pair in passed), sum(pair.is_same for pair in above)
        ),
        "opposites_by_cosine": sum(pair.is_opposite for pair in above),
        "opposites": sum(pair.is_opposite for pair in passed),
    }


def _passes(pair: Pair) -> bool:
    return guard.compare(wording.analyse(pair.left), wording.analyse(pair.right)) is None


def _ratio(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def main() -> None:
    """Prints one line per corpus and threshold; the test parts only."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder of the corpora")
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    corpora = {
        "sick_test": list(sick(flags.data / "SICK_test_annotated.tsv")),
        "msrp_test": list(msrp(flags.data / "msr_paraphrase_train.tsv", test=True)),
    }
    result: dict[str, object] = {"machine": describe()}
    for name, pairs in corpora.items():
        near = cosines(pairs)
        result[name] = [score(pairs, near, threshold) for threshold in THRESHOLDS]
        result[f"{name}_labels"] = Counter("same" if pair.is_same else "other" for pair in pairs)
    print(json.dumps(result, indent=2))
    keep(result, flags.json)


if __name__ == "__main__":
    main()
