"""A comparison's result as a Markdown table, and as a plot in SVG."""

from collections.abc import Sequence
from html import escape
from typing import Any

# One per contestant; the first is infermesh's.
_COLOURS = ("#2f6fde", "#e0923a", "#59a14f", "#b07aa1", "#9c9c9c")
_PANEL, _BAR, _LABEL, _NAME = 260, 26, 40, 110


def markdown(result: dict[str, Any]) -> str:
    """One line per number of streams and contestant; ratios are infermesh's to that contestant."""
    head = "streams, contestant, tokens/s, ratio (95 %), TTFT p50 ms, ratio (95 %), TPOT p50 ms"
    lines = [f"| {head.replace(', ', ' | ')} |", "| --- " * 7 + "|"]
    for row in result["rows"]:
        cells = (
            row["streams"],
            row["contestant"],
            row["tokens_per_s"],
            _ratio(row.get("tokens_per_s_ratio")),
            row["ttft_p50_ms"],
            _ratio(row.get("ttft_p50_ms_ratio")),
            row["tpot_p50_ms"],
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", *map(_bar, result["bars"])]
    for name, why in result["left_out"].items():
        lines.append(f"- {name} is left out: {' '.join(why.split())[-300:]}")
    return "\n".join((*lines, ""))


def _ratio(ratio: dict[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['median']} ({ratio['low']}–{ratio['high']})"


def _bar(bar: dict[str, Any]) -> str:
    wanted = f"≥ {bar['at_least']}" if "at_least" in bar else f"≤ {bar['at_most']}"
    where = f"{bar['figure']} beside {bar['beside']} at {bar['streams']}"
    return f"- {where}: {_ratio(bar['ratio'])}, bar {wanted}: {bar['verdict']}"


def svg(result: dict[str, Any]) -> str:
    """Output tokens/s: a panel per number of streams, a bar per contestant, each panel to scale."""
    panels: dict[int, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        panels.setdefault(row["streams"], []).append(row)
    height = _LABEL + _BAR * max(map(len, panels.values())) + 10
    width = _NAME + _PANEL * len(panels)
    names = [row["contestant"] for row in next(iter(panels.values()))]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *(_text(_NAME - 8, _middle(i), name, anchor="end") for i, name in enumerate(names)),
    ]
    for number, (streams, rows) in enumerate(panels.items()):
        parts += _panel(_NAME + _PANEL * number, streams, rows)
    return "\n".join((*parts, "</svg>", ""))


def _panel(left: int, streams: int, rows: Sequence[dict[str, Any]]) -> list[str]:
    most = max(row["tokens_per_s"] for row in rows)
    plural = "stream" if streams == 1 else "streams"
    parts = [_text(left, _LABEL - 16, f"{streams} {plural}, tokens/s")]
    for index, row in enumerate(rows):
        length = round((_PANEL - 70) * row["tokens_per_s"] / most, 1)
        top, colour = _LABEL + _BAR * index, _COLOURS[index % len(_COLOURS)]
        parts += [
            f'<rect x="{left}" y="{top}" width="{length}" height="{_BAR - 6}" fill="{colour}"/>',
            _text(left + length + 6, _middle(index), str(row["tokens_per_s"])),
        ]
    return parts


def _middle(index: int) -> int:
    return _LABEL + _BAR * index + 14


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'
