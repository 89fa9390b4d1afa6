"""README.md's table of supported models, from what the shard serves and what the tests prove.

`python -m tests.supported_table` prints it, `--write` puts it into README.md between its markers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from services.shard.supported import ARCHITECTURES, Architecture
from tests.architectures import VARIANTS, tiny_fields

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN = "<!-- supported models: printed by `make supported-table` -->"
END = "<!-- end of supported models -->"
# Fields of a tiny config that are worth a word, where set.
_MARKS = {
    "num_local_experts": "experts",
    "num_experts": "experts",
    "sliding_window": "past its sliding window",
    "attn_logit_softcapping": "attention and final soft caps",
    "layer_types": "local and global layers",
    "sliding_window_pattern": "local and global layers with rope bases of their own",
    "embedding_multiplier": "embedding, attention, residual and logit multipliers",
    "logit_scale": "logit scale",
}


def table() -> str:
    """The Markdown table, one row per architecture."""
    rows = ["| `model_type` | models | each by parity with `transformers` |", "| --- | --- | --- |"]
    rows += [
        f"| {a.model_type} | {a.families} | {', '.join(_proven(a)) or 'as published'} |"
        for a in ARCHITECTURES
    ]
    return "\n".join(rows)


def _proven(architecture: Architecture) -> list[str]:
    name = architecture.model_type
    fields = tiny_fields(name, {})
    plain = dict.fromkeys(mark for field, mark in _MARKS.items() if fields.get(field))
    variants = [v.name for v in VARIANTS.values() if v.model_type == name and v.name]
    return [*plain, *variants]


def section(text: str) -> str:
    """What stands between the markers of `text`.

    Raises:
        ValueError: a marker is missing.
    """
    start = text.index(BEGIN) + len(BEGIN)
    return text[start : text.index(END, start)].strip()


def main() -> int:
    """Prints or writes the table."""
    if "--write" not in sys.argv[1:]:
        print(table())
        return 0
    text = README.read_text()
    before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
    README.write_text(f"{text[:before]}\n{table()}\n{text[after:]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
