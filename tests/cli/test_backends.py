import json

from deltamoe.cli import main
from deltamoe.ops.backend import table


def test_every_backend_has_a_line_and_a_reason(capsys):
    assert main(["backends"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["OPERATOR", "BACKEND", "HERE"]
    rows = table()
    assert len(lines) == len(rows) + 1
    for line, row in zip(lines[1:], rows, strict=True):
        assert line.split()[:2] == [row.operator, row.name]
        if row.is_default:
            assert line.endswith("taken by default")
        elif not row.available:
            assert line.endswith(row.why_not)


def test_json_has_the_same_rows(capsys):
    assert main(["backends", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["backends"]
    assert [(r["operator"], r["name"], r["available"]) for r in rows] == [
        (row.operator, row.name, row.available) for row in table()
    ]
