"""The benchmarks' frame: arithmetic of figures, turns of peers, and what a result file says."""
import json
import subprocess
import sys

import pytest

from benchmarks import frame
from benchmarks.__main__ import _file_name, main


def test_peers_take_turns_and_ratios_pair_them():
    order, clock = [], iter([2.0, 4.0, 3.0, 2.0, 9.0, 3.0])

    def work(name):
        return lambda: order.append(name) or next(clock)
    samples = frame.interleaved({"ours": work("ours"), "peer": work("peer")}, 3)
    assert order == ["ours", "peer"] * 3 and samples == {"ours": [2.0, 3.0, 9.0], "peer": [4.0, 2.0, 3.0]}
    assert frame.ratio(samples, "ours", "peer") == {
        "unit": "ours / peer", "better": "higher", "repeats": 3, "min": 0.5, "median": 1.5, "max": 3.0}


def test_result_names_machine_versions_and_commit(tmp_path):
    bench = frame.Benchmark("nothing", "does nothing", lambda folder, repeats: frame.report(
        {"folder": folder.name}, {"x": frame.figure([1.0] * repeats, "s", "lower")}, {}))
    result = json.loads(json.dumps(frame.run(bench, tmp_path, 2)))
    assert result["figures"]["x"]["repeats"] == 2 and result["settings"] == {"folder": tmp_path.name}
    assert result["versions"]["python"] == sys.version.split()[0] and "numpy" in result["versions"]
    assert result["machine"]["cores"] >= 1 and result["machine"]["cpu"] and result["load_average"]["before"] >= 0
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert result["commit"] == commit
    assert _file_name(result).startswith("nothing.") and _file_name(result).endswith("cores.json")


@pytest.mark.parametrize("words, code, said", [
    (["--list"], 0, "prepare"), (["inptu"], 2, "unknown benchmark 'inptu'; there is: import, input, prepare, step"),
    (["input", "--repeats", "0"], 2, "must be at least 1")])
def test_command_line(words, code, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    assert main() == code
    printed = capsys.readouterr()
    assert said in (printed.err if code else printed.out)
