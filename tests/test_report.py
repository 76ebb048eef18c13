"""Tables print what they hold; numbers are formatted once, at the edge."""

import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftlib.charts import bar_chart
from peftlib.errors import PeftlibError
from peftlib.report import Table, format_bytes, format_count

ROWS = [
    {"site": "layers.0.attn.q_proj", "method": "LoRA", "parameters": 12288, "bytes": 49152, "share": 0.0123},
    {"site": "layers.0.mlp", "method": "Adapter", "parameters": 1000000, "bytes": 4000000, "share": 0.5},
    {"site": "head", "method": None, "parameters": 0, "bytes": 0},
]
FORMATS = {"bytes": "bytes", "parameters": "count", "share": "percent"}


def test_snapshot():
    table = Table(
        rows=ROWS,
        title="one model",
        columns={"site": "site", "parameters": "params", "bytes": "memory", "share": "share", "method": "by"},
        formats=FORMATS,
        footer={"site": "total", "parameters": 1012288, "bytes": 4049152},
        notes=["frozen weights not counted"],
    )
    assert str(table) == (
        "one model\n"
        "site                     params    memory   share  by\n"
        "--------------------  ---------  --------  ------  -------\n"
        "layers.0.attn.q_proj     12,288  48.0 KiB   1.23%  LoRA\n"
        "layers.0.mlp          1,000,000   3.8 MiB  50.00%  Adapter\n"
        "head                          0       0 B       -  -\n"
        "--------------------  ---------  --------  ------  -------\n"
        "total                 1,012,288   3.9 MiB       -  -\n"
        "frozen weights not counted"
    )
    assert repr(table) == str(table)


@pytest.mark.parametrize(
    "n, text",
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1572864, "1.5 MiB"),
        (1024**2 - 1, "1.0 MiB"),  # not 1024.0 KiB
        (5 * 1024**4, "5.0 TiB"),
        (4096 * 1024**5, "4,096.0 PiB"),
        (-1536, "-1.5 KiB"),
    ],
)
def test_format_bytes(n, text):
    assert format_bytes(n) == text


def test_format_count():
    assert [format_count(n) for n in (0, 999, 1000, -1234567)] == ["0", "999", "1,000", "-1,234,567"]


@given(st.integers(0, 2**59))
def test_format_bytes_is_within_rounding(n):
    shown, unit = format_bytes(n).split()
    number = float(shown.replace(",", ""))
    size = 1024 ** ["B", "KiB", "MiB", "GiB", "TiB", "PiB"].index(unit)
    assert abs(number * size - n) <= 0.0501 * size
    assert number < 1024


def test_values_stay_raw():
    table = Table(rows=ROWS, formats=FORMATS)
    assert table.rows is ROWS
    assert "49,152" not in str(table)


def test_to_dict_is_json():
    rows = [
        {"dtype": torch.bfloat16, "n": np.int64(3), "x": torch.tensor(0.5), "shape": (2, 3), "none": None}
    ]
    read = json.loads(json.dumps(Table(rows=rows, title="t", notes=["n"]).to_dict()))
    assert read["rows"] == [{"dtype": "torch.bfloat16", "n": 3, "x": 0.5, "shape": [2, 3], "none": None}]
    assert (read["title"], read["notes"], read["footer"]) == ("t", ["n"], None)


def test_html_is_escaped():
    table = Table(rows=[{"<site>": "<b>&"}], title="<i>", notes=["<n>"], footer={"<site>": "<f>"})
    page = table._repr_html_()
    for raw in ("<site>", "<b>", "<i>", "<n>", "<f>"):
        assert raw not in page
    assert "&lt;b&gt;&amp;" in page
    assert page.count("<tr>") == 3


def test_long_names_are_clipped_in_the_middle():
    name = "model.decoder." + "very_deep." * 20 + "layers.11.q_proj"
    table = Table(rows=[{"site": name, "bytes": 5}, {"site": "head", "bytes": 1}], width=60)
    lines = str(table).splitlines()
    assert max(map(len, lines)) == 60
    assert lines[2].startswith("model.decoder.")
    assert "…" in lines[2]
    assert "layers.11.q_proj" in lines[2]
    assert table.rows[0]["site"] == name


def test_numbers_are_never_clipped():
    table = Table(rows=[{"a": 10**20, "b": 10**20, "c": "x" * 50}], width=20)
    assert str(table).count("100,000,000,000,000,000,000") == 2


def test_words_in_a_column_of_numbers():
    lines = str(Table(rows=[{"n": 1000}, {"n": 2}, {"n": "shared"}], formats={"n": "count"})).splitlines()
    assert lines[2:] == [" 1,000", "     2", "shared"]


def test_own_format_and_floats():
    text = str(Table(rows=[{"x": 0.123456, "y": 2, "ok": True}], formats={"y": lambda y: f"{y}x"}))
    assert text.splitlines()[2].split() == ["0.1235", "2x", "True"]


def test_empty():
    assert str(Table(rows=[], title="nothing")) == "nothing\n(empty)"
    assert "<table>" in Table(rows=[])._repr_html_()


def test_wrong_format_and_column():
    with pytest.raises(PeftlibError, match=r"'mib'.*'bytes'"):
        Table(rows=ROWS, formats={"bytes": "mib"})
    with pytest.raises(PeftlibError, match=r"nope.*bytes"):
        Table(rows=ROWS, columns=["site", "nope"])


def test_bar_chart(tmp_path):
    for suffix in ("png", "svg"):
        path = tmp_path / f"peak.{suffix}"
        bar_chart(
            path, ["LoRA", "full"], {"weights": [3e9, 3e9], "optimizer": [1e6, 6e9]}, "peak, CPU", "bytes"
        )
        assert path.stat().st_size > 1000


def test_bar_chart_refuses_ragged_series(tmp_path):
    with pytest.raises(PeftlibError, match=r"'weights' has 1 value.*2 label"):
        bar_chart(tmp_path / "x.png", ["a", "b"], {"weights": [1]})


def test_bar_chart_without_matplotlib(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PeftlibError, match=r"peftlib\[plot\]"):
        bar_chart(tmp_path / "x.png", ["a"], {"weights": [1]})
    assert not (tmp_path / "x.png").exists()
