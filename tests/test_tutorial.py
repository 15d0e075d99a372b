"""docs/tutorial.md: every piece runs, and prints what the page says."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "tutorial.md").read_text()


@pytest.mark.slow
def test_every_piece_prints_what_the_page_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    (tmp_path / "docs" / "figures").mkdir(parents=True)
    names, compared = {}, 0
    for piece, expected in re.findall(r"```python\n(.*?)```(?:\s+```text\n(.*?)```)?", PAGE, re.S):
        exec(piece, names)
        if expected:
            assert capsys.readouterr().out.endswith(expected)  # a run's own lines come before
            compared += 1
    assert compared == 7 and list(tmp_path.glob("docs/figures/*.png"))
