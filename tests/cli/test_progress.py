from deltamoe.cli import progress


def test_lines_of_progress_come_at_intervals(monkeypatch, capsys):
    now = iter([0.0, 1.0, 6.0, 7.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    update = progress._lines()
    update("tokenising", 100, 900)
    update("tokenising", 600, 900)
    update("tokenising", 700, None)
    assert capsys.readouterr().err == "tokenising: 600 B of 900 B\n"


def test_bars_are_drawn_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with progress.byte_progress() as update:
        update("tokenising", 500, 1000)
        update("tokenising", 1000, 1000)
    assert capsys.readouterr().out == ""
