"""The page of a run: self-contained, safe with any text, and the numbers of the run."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from pages import assert_self_contained, parsed, words_of

from dmgen import storage
from dmgen.experiment.run import Run, TextPair
from dmgen.report import write_report
from dmgen.training import run_folder

pytest.importorskip("matplotlib")

OLD_RUN = Path(__file__).parents[1] / "data" / "run-0.1"


def numbers(tree):
    return [float(e.attrib["value"]) for e in tree.iter("data")]


def test_a_finished_run_has_requests_verdicts_and_prices(make_run):
    (path,) = write_report(make_run("run"))
    assert path.name == "report.html"
    tree, text = parsed(path)
    assert_self_contained(tree, text)
    said = words_of(tree)
    assert "The constraint is not met" in said
    assert "Half of the texts are about women" in said
    for shown in ("KL(π‖a)", "KL(p‖a)", "GDC++", "tiny-bios", "166", "seeds", "torch"):
        assert shown in said
    # The very numbers of the files, not rounded ones.
    assert {0.327, 0.638, 0.813, -0.175, 0.347, 2.863} <= set(numbers(tree))
    assert numbers(tree)[:1] == [0.327]
    images = list(tree.iter("img"))
    assert len(images) >= 5
    assert all(e.attrib["alt"] for e in images)


def test_what_a_model_writes_is_text(make_run):
    tree, text = parsed(write_report(make_run("run"))[0])
    assert "<script>" not in text
    assert 'alert("x")' in words_of(tree)
    assert "\x00" not in text
    marked = [e.text for e in tree.iter("mark")]
    assert "she" in marked
    assert "He" in marked


def test_an_unfinished_run_says_so(make_run):
    tree, _ = parsed(write_report(make_run("run", n_steps=3, verdict=None))[0])
    said = words_of(tree)
    assert "not finished: it stands at step 3 of 6" in said
    assert "no verdict" in said
    assert "Half of the texts are about women" in said


def test_pictures_on_request(make_run, tmp_path):
    page, *pictures = write_report(make_run("run"), tmp_path / "there" / "page.html", png=True)
    assert page == tmp_path / "there" / "page.html"
    assert {"page-moment-1.png", "page-ess.png"} <= {p.name for p in pictures}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no run in"):
        write_report(tmp_path)


def test_without_matplotlib_it_says_what_to_install(make_run, monkeypatch):
    monkeypatch.setattr("dmgen.report.figures.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'dmgen\[plots\]'"):
        write_report(make_run("run"))


def test_a_condition_and_a_hard_constraint_are_explained(make_run):
    plain = words_of(parsed(write_report(make_run("plain"))[0])[0])
    assert "constraints on every text" not in plain
    assert "meet a condition" not in plain
    music = {"wordlist": "music"}
    folder = make_run(
        "run",
        constraints=[
            {"moment": {"gender": "female"}, "target": 0.5, "given": music},
            {"pointwise": {"wordlist": "sports"}},
        ],
        verdict=None,
    )
    said = words_of(parsed(write_report(folder)[0])[0])
    assert "Of the texts that mention music, half are about women" in said
    assert "are of those texts that satisfy the constraints on every text" in said
    assert "condition · (feature − requested), which is to be 0" in said


def test_a_run_of_version_0_1_is_reported(tmp_path):
    """Its base, /home/ada/base, need not exist."""
    (path,) = write_report(OLD_RUN, tmp_path / "page.html")
    tree, text = parsed(path)
    assert_self_contained(tree, text)
    said = words_of(tree)
    for shown in ("1 of 3 constraints met (2 not met)", "40 % of the texts match ab",
                  "The mean of length in characters is between 1 and 3", "Every text matches a",
                  "All measurements, at step 6", "2.52 ± 0.16", "torch 2.13.0+cpu"):  # fmt: skip
        assert shown in said
    assert len(list(tree.iter("img"))) == 10


def test_a_run_whose_classifier_heads_have_moved_is_reported(make_run, tmp_path):
    classifier = {"classifier": {"head": str(tmp_path / "moved"), "label": "b", "name": "kind"}}
    folder = make_run("run", constraints=[{"moment": classifier, "target": 0.5}])
    ((step, _, evaluation),) = run_folder.read_evaluations(folder)
    row = replace(evaluation.moments[0], name="kind")
    run_folder.append_evaluation(folder, step, replace(evaluation, moments=[row]), final=True)
    assert "Half of the texts have kind" in words_of(parsed(write_report(folder)[0])[0])


def test_a_run_without_a_configuration_is_reported(make_run):
    """`Trainer.train(out=...)` writes none, and `EBM.save` writes the constraints."""
    folder = make_run("run")
    (folder / "config.yaml").unlink()
    run = Run.load(folder)
    assert "Half of the texts are about women" in words_of(parsed(write_report(run)[0])[0])
    (folder / "target.json").unlink()
    said = words_of(parsed(write_report(folder)[0])[0])
    assert "Mean of female = 0.5, met from 0.45 to 0.55." in said


def test_overlapping_matches_are_marked_once(make_run):
    """White space is kept, for a text is shown as it is."""
    folder = make_run(
        "run", constraints=[{"pointwise": {"regex": "b.rn"}}, {"pointwise": {"regex": "rn. "}}],
        verdict=None,
    )  # fmt: skip
    values = {"base": {}, "policy": {}}
    pair = TextPair("", "I am  born. <b>Now</b>", "b\nrn", values)
    storage.write_rows(folder / "samples.jsonl", [asdict(pair)])
    tree, _ = parsed(write_report(folder)[0])
    assert [e.text for e in tree.iter("mark")] == ["born", ". "]
    before, after = (e for e in tree.iter("div") if e.get("dir") == "auto")
    assert "".join(before.itertext()) == "before I am  born. <b>Now</b>"
    assert "".join(after.itertext()) == "after b\nrn"
