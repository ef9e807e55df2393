from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.report.numbers import GIB, aligned, bar, gib, parameter_count, percent, rate, seconds, significant, spelled


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0.00 GiB"),
        (GIB // 4, "0.25 GiB"),
        (3 * GIB // 2, "1.50 GiB"),
        (round(51.34 * GIB), "51.3 GiB"),
        (1024 * GIB, "1,024 GiB"),
    ],
)
def test_bytes_are_written_in_binary_gibibytes(size_bytes: int, text: str) -> None:
    assert gib(size_bytes) == text


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0, "0 s"),
        (0.000812, "0.812 ms"),
        (0.0851, "85.1 ms"),
        (0.99999, "1.00 s"),
        (2.314, "2.31 s"),
        (4321, "4,320 s"),
    ],
)
def test_durations_have_three_digits(duration_s: float, text: str) -> None:
    assert seconds(duration_s) == text


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        (1_543_714_304, "1.54 B"),
        (124_439_808, "124 M"),
        (999_999_999, "1.00 B"),
        (671_026_419_200, "671 B"),
        (12, "12"),
    ],
)
def test_parameters_are_counted_in_the_largest_unit_below_them(parameters: int, text: str) -> None:
    assert parameter_count(parameters) == text


def test_rates_claim_no_more_digits_than_a_prediction_has() -> None:
    assert rate(56_742.3) == "56,700"
    assert rate(9.996) == "10.0"


def test_small_shares_keep_a_decimal() -> None:
    assert [percent(share) for share in (0, 0.0351, 0.0997, 0.4812, 1)] == ["0.0 %", "3.5 %", "10 %", "48 %", "100 %"]


def test_a_column_of_numbers_shows_the_smallest_and_lines_up() -> None:
    assert aligned([0.51, 12.3, 1234]) == ["0.51", "12.30", "1,234.00"]
    assert aligned([410.2, 1234.7]) == ["410", "1,235"]


@given(st.lists(st.floats(min_value=0, max_value=1e15), min_size=1))
def test_a_column_of_numbers_has_one_number_of_decimals(values: list[float]) -> None:
    assert len({len(text.partition(".")[2]) for text in aligned(values)}) == 1


@given(st.floats(min_value=0, max_value=5), st.integers(min_value=1, max_value=60))
def test_a_bar_is_as_wide_as_asked(share: float, width: int) -> None:
    assert len(bar(share, width)) == width


def test_a_bar_is_full_at_one_and_stays_full_above() -> None:
    assert bar(0.25, 8) == "██░░░░░░"
    assert bar(1, 4) == bar(3, 4) == "████"


@pytest.mark.parametrize(
    ("hours", "text"),
    [(0.136, "8.16 minutes"), (1.0, "1.00 hours"), (47.9, "47.9 hours"), (48.0, "2.00 days"), (2400.0, "100 days")],
)
def test_a_long_time_is_spelled_in_the_unit_that_people_use(hours: float, text: str) -> None:
    assert spelled(hours) == text


def test_a_quantity_has_three_digits() -> None:
    assert [significant(value) for value in (0, 0.01234, 28.44, 8417.9)] == ["0", "0.0123", "28.4", "8,420"]
