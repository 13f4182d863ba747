"""Sizes as people write them, and as they read them."""

import pytest

from memlab.units import (
    GiB,
    KiB,
    MiB,
    TiB,
    format_bytes,
    parse_bytes,
    residual,
    times_less,
    times_time,
)


@pytest.mark.parametrize(
    "text, size",
    [
        (1, 1),
        (2**40 + 1, 2**40 + 1),
        ("1", 1),
        ("17 B", 17),
        ("2 KiB", 2 * KiB),
        ("600 MiB", 600 * MiB),
        ("2 GiB", 2 * GiB),
        ("1.5 GiB", 3 * GiB // 2),
        ("1 TiB", TiB),
        ("2gib", 2 * GiB),
        ("  3 mB ", 3_000_000),
        ("1.5 GB", 1_500_000_000),
        ("1 TB", 10**12),
        ("1 kB", 1000),
        ("0.5 KiB", 512),
    ],
)
def test_a_size_is_read_to_the_byte(text, size):
    assert parse_bytes(text) == size
    assert isinstance(parse_bytes(text), int)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "2 gigs",
        "two GiB",
        "1e3 MiB",
        "1_000",
        "-3 MiB",
        "inf",
        "nan",
        "1.",
        "2 GiB 3",
        "٣ MiB",
    ],
)
def test_a_text_that_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is not a size. Write it as"):
        parse_bytes(text)


@pytest.mark.parametrize("size", [None, True, False, 2.5, [1], b"1 GiB"])
def test_neither_a_text_nor_a_whole_number_is_refused(size):
    with pytest.raises(ValueError, match="a size is a number of bytes or a text"):
        parse_bytes(size)


@pytest.mark.parametrize("size", [0, -1, "0", "0 GiB", "0.0 MiB", "0.0001 KiB"])
def test_nothing_or_less_is_refused(size):
    with pytest.raises(ValueError, match="more than zero bytes"):
        parse_bytes(size)


@pytest.mark.parametrize(
    "size, text",
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1,023 B"),
        (KiB, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (MiB - 1, "1,024.00 KiB"),
        (MiB, "1.00 MiB"),
        (172_064_796, "164.09 MiB"),
        (GiB, "1.00 GiB"),
        (TiB, "1.00 TiB"),
        (2000 * TiB, "2,000.00 TiB"),
        (-2 * MiB, "-2.00 MiB"),
    ],
)
def test_a_size_is_written_for_people(size, text):
    assert format_bytes(size) == text


def test_what_was_not_measured_is_not_written_as_a_number():
    assert format_bytes(None) == "-"


def test_ratios_and_what_a_prediction_missed():
    assert times_less(4 * MiB, MiB) == 4 and times_less(MiB, 2 * MiB) == 0.5
    assert times_time(0.5, 0.75) == 1.5
    assert times_time(None, 1.0) is None and times_time(1.0, None) is None
    assert residual(99, 100) == -0.01 and residual(100, None) is None
