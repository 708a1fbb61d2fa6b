"""Run folders: complete checkpoints only, and whose folder it is."""

import json
import math
import os

import pytest
import torch

from dmgen import storage
from dmgen.training import run_folder

ROWS = [{"step": step, "log_z": -1.5} for step in (1, 2, 3)]


def written(folder):
    return sorted(os.listdir(folder / "checkpoints"))


def checkpoint(folder, step, **facts):
    run_folder.save_checkpoint(
        folder, step, {"w": torch.full((2,), float(step))}, {"step": step, **facts}
    )


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    tensors = {
        "policy.logits": torch.randn(3, 4, dtype=torch.float64),
        "optimizer.0.step": torch.tensor(7.0),
        "generator": torch.Generator().manual_seed(3).get_state(),
        "transposed": torch.arange(6).reshape(2, 3).T,
    }
    facts = {"step": 5, "seconds": 0.1 + 0.2, "log_z": -math.inf, "history": ROWS}
    run_folder.save_checkpoint(tmp_path, 5, tensors, facts)
    loaded, said = run_folder.load_checkpoint(tmp_path)
    assert said == facts
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)


def test_tensors_that_share_memory_are_saved_apart(tmp_path):
    whole = torch.arange(4.0)
    run_folder.save_checkpoint(tmp_path, 1, {"all": whole, "half": whole[:2]}, {})
    assert run_folder.load_checkpoint(tmp_path)[0]["half"].tolist() == [0.0, 1.0]


def test_only_what_shares_memory_is_copied(tmp_path, monkeypatch):
    # A copy of everything would take as much memory again.
    whole, other, given = torch.arange(4.0), torch.ones(3, requires_grad=True), {}
    monkeypatch.setattr(run_folder, "save_file", lambda tensors, path: given.update(tensors))
    run_folder.save_checkpoint(tmp_path, 1, {"all": whole, "half": whole[2:], "other": other}, {})
    assert given["all"].data_ptr() == whole.data_ptr()
    assert given["other"].data_ptr() == other.data_ptr()
    assert given["half"].tolist() == [2.0, 3.0]
    assert given["half"].data_ptr() != whole[2:].data_ptr()


def test_the_last_two_are_kept_in_order_of_steps(tmp_path):
    for step in (8, 9, 10, 11):  # "step-9" sorts after "step-10" as text
        checkpoint(tmp_path, step)
    assert written(tmp_path) == ["step-10", "step-11"]
    assert run_folder.load_checkpoint(tmp_path)[1]["step"] == 11


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    checkpoint(tmp_path, 3, note="old")
    checkpoint(tmp_path, 3, note="new")
    assert run_folder.load_checkpoint(tmp_path)[1]["note"] == "new"
    assert written(tmp_path) == ["step-3"]


def test_a_crash_while_writing_leaves_the_last_whole_one(tmp_path, monkeypatch):
    checkpoint(tmp_path, 1)

    def crash(*_):
        raise KeyboardInterrupt

    for victim in ("save_file", "write_json"):
        monkeypatch.setattr(run_folder, victim, crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoint(tmp_path, 2)
        monkeypatch.undo()
        assert written(tmp_path) == [".step-2.partial", "step-1"]
        assert run_folder.load_checkpoint(tmp_path)[1]["step"] == 1
    checkpoint(tmp_path, 3)
    assert written(tmp_path) == ["step-1", "step-3"]  # and the rubbish is gone


def test_a_crash_while_replacing_leaves_a_whole_one(tmp_path, monkeypatch):
    checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2, note="old")

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folder, "save_file", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint(tmp_path, 2, note="new")
    assert run_folder.load_checkpoint(tmp_path)[1] == {"step": 2, "note": "old"}


def test_other_folders_are_not_taken_for_checkpoints(tmp_path):
    checkpoint(tmp_path, 4)
    for name in ("step-99.bak", "step-", "step-five", ".step-7.partial", "other"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert run_folder.load_checkpoint(tmp_path)[1]["step"] == 4


def test_no_checkpoint_is_said(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no checkpoint"):
        run_folder.load_checkpoint(tmp_path)


def folder_with_rows(tmp_path, n=3, tail=""):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in ROWS[:n]) + tail
    )
    return tmp_path


def test_a_new_run_makes_its_folder(tmp_path):
    run_folder.open_run(tmp_path / "a" / "b", expected_step=0)
    assert (tmp_path / "a" / "b").is_dir()
    run_folder.open_run(tmp_path / "a" / "b", expected_step=0)  # still without a run


def test_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        run_folder.open_run(tmp_path / "run", expected_step=0)


def test_a_new_run_refuses_the_folder_of_another(tmp_path):
    with pytest.raises(ValueError, match=r"already holds a run of 3 steps.*--resume"):
        run_folder.open_run(folder_with_rows(tmp_path), expected_step=0)


def test_a_new_run_refuses_checkpoints_without_rows(tmp_path):
    checkpoint(tmp_path, 4)
    with pytest.raises(ValueError, match="already holds a run"):
        run_folder.open_run(tmp_path, expected_step=0)


@pytest.mark.parametrize("step", [4, 9])
def test_a_run_that_is_ahead_of_the_folder_is_refused(tmp_path, step):
    with pytest.raises(ValueError, match=f"holds 3 steps, but this sampler stands at step {step}"):
        run_folder.open_run(folder_with_rows(tmp_path), expected_step=step)


def test_a_trained_sampler_refuses_a_folder_without_its_history(tmp_path):
    with pytest.raises(ValueError, match="holds 0 steps"):
        run_folder.open_run(tmp_path, expected_step=2)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_rows_after_the_checkpoint_are_cut_off(tmp_path, step):
    folder_with_rows(tmp_path)
    (tmp_path / "evaluations.jsonl").write_text('{"step": 1}\n{"step": 3}\n')
    run_folder.open_run(tmp_path, expected_step=step)
    assert storage.read_rows(tmp_path / "metrics.jsonl") == ROWS[:step]
    kept = [row["step"] for row in storage.read_rows(tmp_path / "evaluations.jsonl")]
    assert kept == [s for s in (1, 3) if s <= step]


@pytest.mark.parametrize("tail", ['{"step": 4, "lo', json.dumps({"step": 4, "log_z": 0})])
def test_what_a_crash_left_half_written_does_not_spoil_the_next_row(tmp_path, tail):
    folder_with_rows(tmp_path, tail=tail)
    run_folder.open_run(tmp_path, expected_step=3)
    storage.append_row(tmp_path / "metrics.jsonl", {"step": 4, "log_z": 1.0})
    storage.append_row(tmp_path / "metrics.jsonl", {"step": 5, "log_z": 1.0})
    assert [row["step"] for row in storage.read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
