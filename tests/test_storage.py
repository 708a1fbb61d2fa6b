"""Files that are replaced as a whole, and rows that survive a crash."""

import json
import math
import os

import pytest
import yaml

from dmgen import storage
from dmgen.experiment import versions

ROWS = [{"step": step, "log_z": -1.5} for step in (1, 2, 3)]


def test_rows_come_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for row in ROWS:
        storage.append_row(path, row)
    assert storage.read_rows(path) == ROWS
    storage.write_rows(path, ROWS[:1])
    assert storage.read_rows(path) == ROWS[:1]


@pytest.mark.parametrize("cut", range(1, 28))
def test_a_last_line_cut_anywhere_is_left_out(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    path.write_text(text[:-cut])
    # Only the newline missing: the row is whole.
    assert storage.read_rows(path) == (ROWS if cut == 1 else ROWS[:2])


def test_a_last_line_cut_inside_a_letter_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "moment/größe": 0.5}, {"step": 2, "moment/größe": 0.25}]
    storage.write_rows(path, rows)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex("ö".encode()) + 1])
    assert storage.read_rows(path) == rows[:1]


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "target.json"
    for text in (b"", b'{"a": ', b"\xff\xfe{"):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=r"target\.json is damaged"):
            storage.read_json(path)


def test_a_broken_line_before_the_last_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON"):
        storage.read_rows(path)


def test_replacing_a_file_never_shows_half_of_it(tmp_path, monkeypatch):
    path = tmp_path / "new" / "target.json"
    storage.write_json(path, {"λ": 1})
    assert "λ" in path.read_text(encoding="utf-8")

    def crash(*_):
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk"):
        storage.write_json(path, {"λ": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"λ": 1}


def test_the_config_is_yaml_with_the_versions_as_comments(tmp_path):
    versions.write_config(tmp_path, {"learning_rate": 1e-4, "seed": 0, "name": "é"})
    text = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == {"learning_rate": 1e-4, "seed": 0, "name": "é"}
    assert "# torch " in text
    assert set(versions.versions()) >= {"python", "machine", "dmgen", "torch", "transformers"}


def test_rows_are_json_for_any_reader(tmp_path):
    path = tmp_path / "metrics.jsonl"
    storage.append_row(path, {"step": 1, "log_z": -math.inf, "drift": math.nan, "updated": True})
    storage.write_rows(
        path, [*storage.read_rows(path), {"step": 2, "log_z": 0.5, "drift": math.inf}]
    )

    def refuse(word):
        raise ValueError(word)

    rows = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert rows[0] == {"step": 1, "log_z": None, "drift": None, "updated": True}
    assert rows[1] == {"step": 2, "log_z": 0.5, "drift": None}


def test_a_folder_is_no_file_to_write(tmp_path):
    with pytest.raises(ValueError, match="is a folder: give a file"):
        storage.write_text(tmp_path, "x")
    assert not list(tmp_path.parent.glob("*.partial"))
