"""The arithmetic of the load generator's figures, on timelines whose figures are known."""

import pytest

from benchmarks.timeline import Timeline, percentile_ms, report


def answered(due_s: float, *chunks_s: float) -> Timeline:
    """Ends half a second after its last chunk, of one token each."""
    return Timeline(due_s, list(chunks_s), chunks_s[-1] + 0.5, output_tokens=len(chunks_s))


def test_times_count_from_when_a_request_was_due() -> None:
    one = answered(10.0, 12.0, 12.25, 13.0)
    assert one.ttft_s == 2.0
    assert one.gaps_s == [0.25, 0.75]
    assert one.tpot_s == 0.5
    assert one.e2e_s == 3.5


def test_time_per_token_counts_tokens_when_a_chunk_holds_several() -> None:
    one = answered(0.0, 1.0, 2.0)
    one.output_tokens = 5
    assert one.tpot_s == 0.25


def test_time_per_token_is_unknown_when_there_is_one_token() -> None:
    assert answered(0.0, 1.0).tpot_s is None


def test_first_token_is_the_end_when_an_answer_showed_nothing() -> None:
    assert Timeline(1.0, [], 4.0, output_tokens=3).ttft_s == 3.0


def test_report_has_rate_and_medians_of_what_was_answered() -> None:
    done = [
        answered(0.0, 1.0, 1.1, 1.3),
        answered(0.0, 2.0, 2.1, 2.3),
        answered(0.0, 4.0, 4.1, 4.3),
    ]
    figures = report(done, wall_s=4.5)
    assert figures.requests == 3
    assert figures.output_tokens == 9
    assert figures.tokens_per_s == 2.0
    assert figures.ttft_p50_ms == 2000.0
    assert figures.itl_p50_ms == 150.0
    assert figures.tpot_p50_ms == 150.0
    assert figures.e2e_p50_ms == 2800.0
    assert figures.ttft_p99_ms == pytest.approx(3960.0)
    assert figures.errors == {}


def test_failures_are_counted_by_name_and_kept_out_of_the_figures() -> None:
    refused = [Timeline(0.0, [], 9.0, error="queue_full") for _ in range(2)]
    torn = Timeline(0.0, [5.0], 9.0, output_tokens=40, error="cut_off")
    figures = report([answered(0.0, 1.0, 2.0), *refused, torn], wall_s=1.0)
    assert figures.errors == {"queue_full": 2, "cut_off": 1}
    assert figures.requests == 1
    assert figures.output_tokens == 2
    assert figures.ttft_p50_ms == 1000.0
    assert figures.e2e_p99_ms == 2500.0


def test_figures_are_none_when_nothing_was_answered() -> None:
    figures = report([Timeline(0.0, [], 1.0, error="http_500")], wall_s=1.0)
    assert figures.ttft_p50_ms is figures.itl_p99_ms is figures.e2e_p50_ms is None
    assert figures.tokens_per_s == 0.0


def test_percentiles_lie_between_the_nearest_values() -> None:
    seconds = [i / 1000 for i in range(1, 102)]
    assert percentile_ms(seconds, 50) == 51.0
    assert percentile_ms(seconds, 99) == 100.0
    assert percentile_ms([0.0, 0.01], 50) == 5.0
    assert percentile_ms([0.25], 99) == 250.0
    assert percentile_ms([], 50) is None
