"""Random rows to be sampled, with every setting that there is."""

from __future__ import annotations

from hypothesis import strategies as st

from services.shard.domain import Sampling
from services.shard.slots import ActiveRow
from tests.unit.shard.rows import active_row

VOCAB = 200

_samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.95, 0.6, 0.1]),
    top_k=st.sampled_from([0, 1, 5, 60, 10_000]),
    min_p=st.sampled_from([0.0, 0.05, 0.9]),
    presence_penalty=st.sampled_from([0.0, 1.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.7]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=3),
    seed=st.integers(0, 2**64 - 1),
    top_logprobs=st.sampled_from([None, 0, 5]),
)
_tokens = st.lists(st.integers(0, VOCAB - 1), max_size=12)


@st.composite
def random_rows(draw: st.DrawFn) -> ActiveRow:
    """One row; penalties, bias and suppression included."""
    prompt = draw(_tokens)
    output = draw(_tokens)
    return active_row(
        draw(_samplings),
        choice=draw(st.integers(0, 3)),
        start=len(prompt) + len(output),
        prompt=prompt,
        output=output,
        min_tokens=draw(st.sampled_from([0, 30])),
        suppressed=draw(st.lists(st.integers(0, VOCAB - 1), max_size=3)),
    )
