"""What a notebook shows: tables of rows and of traces, and one bar for long work."""

import sys
from types import SimpleNamespace

from kv_gym import open_traces
from kv_gym.evaluation.rows import result
from kv_gym.notebook import ResultRows
from kv_gym.progress import ProgressBar

ROW = {
    "policy": "h2o<b>",
    "allocation": "uniform",
    "budget": 0.25,
    "task": "copy",
    "accuracy": 1 / 3,
    "evicted": "drop",
}


def test_results_are_tables_of_what_their_rows_have():
    html = result([ROW, ROW | {"accuracy": None}])._repr_html_()
    assert "<th>accuracy</th>" in html and "<td>0.3333</td>" in html and "<td></td>" in html
    assert "h2o&lt;b&gt;" in html and "nll" not in html and "evicted" not in html
    assert "<li>1/4 is enough</li>" in type(result([]))(verdict=["1/4 is enough"], rows=[ROW])._repr_html_()
    assert "and 50 more rows" in ResultRows([ROW] * 250)._repr_html_()


def test_a_trace_set_says_what_it_holds():
    traces = open_traces()
    html = traces._repr_html_()
    assert traces.hash[:16] in html and f"{len(traces)} sequences" in html and "train" in html


def test_a_bar_is_drawn_again_in_its_place(monkeypatch, capsys):
    drawn = []
    place = SimpleNamespace(update=drawn.append)
    display = SimpleNamespace(HTML=str, display=lambda shown, display_id: place)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    with ProgressBar("train", 1000) as bar:
        for _ in range(1000):
            bar.advance()
    assert 2 <= len(drawn) <= 4 and drawn[0].startswith('<progress value="1" max="1000">')
    assert drawn[-1] == "train: 1000 of 1000" and capsys.readouterr() == ("", "")
