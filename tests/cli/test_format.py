import pytest

from deltamoe.cli.format import count, flops, size, table


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (999.6, "1k"), (2_450_000, "2.45M"),
     (49_122_681_728, "49.1B"), (1.4e12, "1.4T"), (5e17, "500000T")],
)  # fmt: skip
def test_counts(number, text):
    assert count(number) == text


def test_flops_and_sizes():
    assert flops(81.5e9) == "81.5 GFLOP"
    assert flops(3) == "3 FLOP"
    assert [size(n) for n in (950, 1024, 43_417_600, 24 << 30)] == [
        "950 B", "1 KiB", "41.4 MiB", "24 GiB",
    ]  # fmt: skip
    assert size(1000) == "0.977 KiB"  # three digits at most


def test_a_table_is_aligned():
    rows = [("part", "total"), ("kda", "12"), ("", "3,456")]
    assert table(rows, right=(1,), indent=1) == " part  total\n kda      12\n       3,456"
    assert table([("a", ""), ("bb", "")]) == "a\nbb"
