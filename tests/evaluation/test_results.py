"""Results on the disk and as tables."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from ddpm_jax.evaluation.results import RESULTS, TABLE, lines, metric_names, record
from ddpm_jax.runtime.errors import UserError

RESULT = {
    "features": "pixels",
    "num_real": 600,
    "FID": 7.5,
    "FID, 95 % interval": [7.0, 8.0],
    "FID, floor": 0.25,
    "KID": 0.5,
    "KID, deviation of 10 subsets": 0.125,
    "note": "Few images.",
    "not computed": "recall",
}


class TestRecord:
    def test_adds_up(self, tmp_path):
        record(tmp_path, RESULT, {"step": 3, "eta": 0.5})
        record(tmp_path, {"features": "x", "FID": 3.17, "FID, 95 % interval": [3.1, 3.25], "FID, floor": 0.5}, {})
        history = json.loads((tmp_path / RESULTS).read_text())
        assert [entry["features"] for entry in history] == ["pixels", "x"]
        assert (history[0]["step"], history[0]["eta"]) == (3, 0.5)
        assert history[0]["metrics"] == ["FID", "FID, floor", "KID"]  # eta is a setting
        table = (tmp_path / TABLE).read_text()
        head, _, *rows = [line for line in table.splitlines() if line.startswith("|")]
        columns = [cell.strip() for cell in head.strip("|").split("|")]
        assert columns[columns.index("FID") + 1] == "FID, floor"
        assert "eta" in columns
        assert not any("interval" in name or "deviation" in name or name in ("note", "metrics") for name in columns)
        assert "| 3.17 (3.1 to 3.25) | 0.5 |" in rows[1]
        assert all(row.count("|") == head.count("|") for row in rows)
        assert f"- {history[0]['time']}: Few images." in table
        assert f"- {history[0]['time']}: not computed: recall." in table

    def test_of_several_at_once(self, tmp_path):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: record(tmp_path, RESULT, {"step": number}), range(40)))
        history = json.loads((tmp_path / RESULTS).read_text())
        assert sorted(entry["step"] for entry in history) == list(range(40))
        assert sorted(found.name for found in tmp_path.iterdir()) == [RESULTS, TABLE]

    def test_refuses_a_broken_history(self, tmp_path):
        (tmp_path / RESULTS).write_text("[")
        with pytest.raises(UserError, match="is not valid JSON"):
            record(tmp_path, RESULT, {})
        assert (tmp_path / RESULTS).read_text() == "["


def test_lines():
    assert lines(RESULT) == [
        "features  pixels",
        "num_real  600",
        "FID       7.5 (7 to 8)  floor 0.25",
        "KID       0.5 (0.125)",
        "Few images.",
        "Not computed: recall.",
    ]
    assert metric_names(RESULT) == ["FID", "FID, floor", "KID"]
