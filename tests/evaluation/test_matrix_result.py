from __future__ import annotations

import copy
import csv
import json
import math
import pickle
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from alignfast.evaluation.matrix_result import (
    Cell,
    Comparison,
    Rate,
    TransferMatrix,
    difference_text,
    p_text,
    rate_text,
)
from alignfast.evaluation.statistics import paired, wilson

KEYS = ["source", "attack", "target", "rate", "low", "high", "n", "clean_accuracy", "white_box"]


def matrix() -> TransferMatrix:
    cells = [
        Cell.counted("vanilla", "mi", "vgg", errors=40, n=100, clean_accuracy=0.93, white_box=0.99),
        Cell.counted("vanilla", "mi", "vit[b]", errors=0, n=0, clean_accuracy=0.88, white_box=0.99),
        Cell.counted("aligned", "mi", "vgg", errors=60, n=100, clean_accuracy=0.93),
    ]
    baseline, source = np.arange(100) < 40, np.arange(100) < 60
    nothing = np.zeros(0, bool)
    comparisons = (
        Comparison.of("vanilla", "aligned", "mi", "vgg", paired(baseline, source)),
        Comparison.of("vanilla", "aligned", "mi", "vit[b]", paired(nothing, nothing)),
    )
    return TransferMatrix(tuple(cells), comparisons, {"seed": 0, "eps": math.nan, "x": (1, 2)}, {"torch": "2.14.1"})


def test_error_acts_as_the_rate() -> None:
    rate = matrix().error("vanilla", "mi", "vgg")
    assert rate == 0.4
    assert 0.3 < rate < 0.5
    assert (rate.low, rate.high) == wilson(40, 100)
    assert rate.n == 100
    assert f"{rate:.1%}" == "40.0%"
    assert (str(rate), json.dumps(rate)) == ("0.4", "0.4")
    assert repr(rate).startswith("Rate(0.4, low=0.309")


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda rate: pickle.loads(pickle.dumps(rate))])
def test_rate_is_copied_whole(clone: Any) -> None:
    rate = clone(Rate(0.4, 0.3, 0.5, 10))
    assert (float(rate), rate.low, rate.high, rate.n) == (0.4, 0.3, 0.5, 10)


def test_names_are_in_first_seen_order() -> None:
    result = matrix()
    assert (result.sources, result.attacks, result.targets) == (("vanilla", "aligned"), ("mi",), ("vgg", "vit[b]"))
    assert result.baselines == ("vanilla",)


def test_unknown_names_say_what_exists() -> None:
    with pytest.raises(ValueError, match=r"source: got 'alligned'.*did you mean 'aligned'.*vanilla, aligned"):
        matrix().error("alligned", "mi", "vgg")
    with pytest.raises(ValueError, match="was not measured"):
        matrix().error("aligned", "mi", "vit[b]")


def test_to_dict_has_the_documented_shape() -> None:
    document = matrix().to_dict()
    assert list(document) == ["cells", "comparisons", "config", "versions"]
    assert [list(cell) for cell in document["cells"]] == [KEYS] * 3
    assert document["cells"][1]["rate"] is None
    assert document["cells"][2]["white_box"] is None
    assert document["config"] == {"seed": 0, "eps": None, "x": [1, 2]}
    assert document["comparisons"][0]["difference"] == pytest.approx(0.2)
    json.dumps(document, allow_nan=False)


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "matrix.json"
    matrix().save(path)
    assert "NaN" not in path.read_text(encoding="utf-8")
    loaded = TransferMatrix.load(path)
    assert loaded.to_dict() == matrix().to_dict()
    assert math.isnan(loaded.error("vanilla", "mi", "vit[b]"))
    assert loaded.cells[0] == matrix().cells[0]
    assert [file.name for file in tmp_path.iterdir()] == ["matrix.json"]


def test_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "matrix.json"
    matrix().save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"config\.model: got object"):
        TransferMatrix(matrix().cells, config={"model": object()}).save(path)
    assert path.read_bytes() == before


def test_comparisons_may_be_absent() -> None:
    document = matrix().to_dict()
    del document["comparisons"]
    assert TransferMatrix.from_dict(document).comparisons == ()


def spoiled(**changes: Any) -> dict[str, Any]:
    document = matrix().to_dict()
    document["cells"][0] |= changes
    return document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "matrix: got list"),
        ({}, 'got no "cells"'),
        ({"cells": {}}, "cells: got dict"),
        ({"cells": [1]}, r"cells\[0\]: got int"),
        ({"cells": [{"source": "a"}]}, r"cells\[0\]: lacks attack, target"),
        ({"cells": [], "config": []}, "config: got list"),
        (spoiled(rate=1.2), r"cells\[0\]\.rate: got 1.2"),
        (spoiled(rate="0.4"), r"cells\[0\]\.rate: got '0.4'"),
        (spoiled(rate=True), r"cells\[0\]\.rate: got True"),
        (spoiled(rate=None), r"cells\[0\]\.rate: got nan for n = 100"),
        (spoiled(rate=0.9), r"cells\[0\]\.rate: got 0.9 outside its interval"),
        (spoiled(low=None), r"cells\[0\]\.low: got None"),
        (spoiled(n=-1), r"cells\[0\]\.n: got -1"),
        (spoiled(n=1.5), r"cells\[0\]\.n: got 1.5"),
        (spoiled(source=""), r"cells\[0\]\.source: got ''"),
        (spoiled(source=3), r"cells\[0\]\.source: got 3"),
        (spoiled(source="aligned"), "cells: aligned, mi, vgg is given twice"),
    ],
)
def test_malformed_documents_give_one_clear_error(document: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "matrix.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        TransferMatrix.load(path)


def test_unreadable_files_give_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*absent\.json"):
        TransferMatrix.load(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_bytes(b'{"cells": [\xff')
    with pytest.raises(ValueError, match=r"broken\.json is not JSON"):
        TransferMatrix.load(tmp_path / "broken.json")


def test_impossible_comparisons_are_refused() -> None:
    with pytest.raises(ValueError, match="only_baseline, only_source: got 3 and 4"):
        Comparison("a", "b", "mi", "vgg", 5, 0.2, 0.1, 0.3, 0.5, 3, 4)
    with pytest.raises(ValueError, match="p_value: got 2"):
        Comparison("a", "b", "mi", "vgg", 5, 0.2, 0.1, 0.3, 2.0, 1, 2)


def test_text_shows_rates_differences_and_names_as_they_are() -> None:
    text = matrix().text()
    assert "40.0 % [30.9, 49.8]" in text
    assert "60.0 % [50.2, 69.1]" in text
    assert "vit[b]" in text
    assert "+20.0 [+11.8, +27.6] p < 0.0001" in text
    assert "clean 93.0 %" in text
    assert "99.0 %" in text
    assert "\x1b" not in text
    lines = text.splitlines()
    assert next(line for line in lines if "aligned" in line).rstrip().endswith("n/a")


def test_table_prints_on_a_narrow_terminal() -> None:
    console = Console(width=60, file=StringIO(), force_terminal=True)
    with console.capture() as capture:
        console.print(matrix().table())
    assert "vanilla" in capture.get()


def test_text_of_an_empty_matrix() -> None:
    assert "no images" in TransferMatrix(()).text()


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_plot_writes_the_heat_map(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"matrix{suffix}"
    matrix().plot(path)
    assert path.stat().st_size > 1000


def test_numbers_as_text() -> None:
    assert rate_text(0.612, 0.571, 0.652) == "61.2 % [57.1, 65.2]"
    assert difference_text(0.052, -0.0001, 0.083) == "+5.2 [0.0, +8.3]"
    assert difference_text(math.nan, -1.0, 1.0) == "n/a"
    assert [p_text(p) for p in (0.00001, 0.0496, 0.5, 1.0)] == ["p < 0.0001", "p = 0.0496", "p = 0.50", "p = 1.00"]


def known() -> TransferMatrix:
    """With an eps, a norm and a defence of some."""
    config = {"eps": {"mi": 4 / 255}, "norm": {"mi": "linf"}, "defences": {"vit[b]": "Jpeg(quality=75)"}}
    return replace(matrix(), config=config)


def test_records_are_flat_and_have_a_row_for_each_cell() -> None:
    records = known().to_records()
    assert [(one["source"], one["attack"], one["target"]) for one in records] == [
        ("vanilla", "mi", "vgg"),
        ("vanilla", "mi", "vit[b]"),
        ("aligned", "mi", "vgg"),
    ]
    for record in records:
        assert list(record)[:9] == KEYS
        assert list(record)[9:] == [
            *("eps", "norm", "defence", "baseline", "difference", "difference_low", "difference_high", "p_value")
        ]
        assert all(value is None or isinstance(value, (str, int, float)) for value in record.values())
    first, second, third = records
    assert (first["rate"], first["n"], first["eps"], first["norm"], first["defence"]) == (
        0.4,
        100,
        4 / 255,
        "linf",
        None,
    )
    assert first["baseline"] is None
    assert math.isnan(first["difference"])
    assert math.isnan(second["rate"])
    assert second["defence"] == "Jpeg(quality=75)"
    (comparison,) = known().comparisons_of("aligned", "mi", "vgg")
    assert (third["baseline"], third["difference"], third["p_value"]) == ("vanilla", 0.2, comparison.p_value)
    assert (third["difference_low"], third["difference_high"]) == (comparison.low, comparison.high)
    bare = matrix().to_records()[0]
    assert math.isnan(bare["eps"])
    assert (bare["norm"], bare["defence"]) == (None, None)


def test_csv_has_the_records_to_the_last_bit(tmp_path: Path) -> None:
    path = tmp_path / "matrix.csv"
    awkward = replace(known(), cells=(*known().cells, Cell.counted('a, "b"', "x\ny", "t", errors=1, n=3)))
    awkward.save_csv(path)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    records = awkward.to_records()
    assert len(rows) == 4
    for row, record in zip(rows, records, strict=True):
        assert list(row) == list(record)
        for name, value in record.items():
            missing = value is None or (isinstance(value, float) and math.isnan(value))
            assert row[name] == ("" if missing else str(value))
    assert float(rows[3]["rate"]) == 1 / 3
    assert [path.name for path in tmp_path.iterdir()] == ["matrix.csv"]


def test_pandas_reads_both_alike(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    known().save_csv(tmp_path / "matrix.csv")
    frame, read = pandas.DataFrame(known().to_records()), pandas.read_csv(tmp_path / "matrix.csv")
    assert list(frame.columns) == list(read.columns)
    assert read.rate.tolist()[::2] == frame.rate.tolist()[::2] == [0.4, 0.6]
    assert read.rate.isna().tolist() == frame.rate.isna().tolist() == [False, True, False]
    assert frame[frame.p_value < 0.05].source.tolist() == read[read.p_value < 0.05].source.tolist() == ["aligned"]
    assert read.defence.isna().tolist() == frame.defence.isna().tolist() == [True, False, True]
