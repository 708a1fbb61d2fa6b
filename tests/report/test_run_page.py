"""The pages: self-contained, safe with any text, and the numbers of the result files."""

import json
import re
from xml.etree import ElementTree

import pytest
import yaml

from dmgen import storage
from dmgen.experiment import versions
from dmgen.experiment.config import RunConfig
from dmgen.report import figures, write_comparison, write_report
from dmgen.report.comparison import group_names
from dmgen.report.panels import Curves
from dmgen.report.read import RunRecord, bases_of, goals_of

pytest.importorskip("matplotlib")


def parsed(path):
    """The page as a tree; a strict reader refuses what is not closed or escaped."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n")), text


def words_of(tree):
    return " ".join(" ".join(tree.itertext()).split())


def assert_self_contained(tree, text):
    for element in tree.iter():
        assert element.tag != "script"
        for name, value in element.attrib.items():
            if name in ("src", "href"):
                assert value.startswith("data:")
            assert not name.startswith("on")
    assert not re.search(r"url\(\s*['\"]?http", text)


def numbers(tree):
    return [float(e.attrib["value"]) for e in tree.iter("data")]


def test_a_finished_run_tells_what_was_asked_reached_and_paid(make_run):
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


def test_a_comparison_groups_the_seeds(make_run, tmp_path):
    folders = [
        make_run("a", seed=0),
        make_run("b", seed=1, moment=0.33),
        make_run("c", method="GDC", moment=0.31),
        make_run("d", method="GDC", seed=1, n_steps=3, verdict=None),
    ]
    names = group_names([RunRecord.read(f) for f in folders])
    assert names == [("GDC++", 0), ("GDC++", 1), ("GDC", 0), ("GDC", 1)]
    page, *pictures = write_comparison(folders, tmp_path / "compare.html", png=True)
    tree, text = parsed(page)
    assert_self_contained(tree, text)
    said = words_of(tree)
    assert "4 runs, 2 settings compared" in said
    assert said.count("Half of the texts are about women") == 1
    assert "0.330 ± 0.010 (not met)" in said
    assert "not measured yet" in said
    assert "band: from the lowest to the highest seed" in said
    assert len(pictures) >= 8


def test_settings_that_differ_are_in_the_name(make_run):
    folders = [make_run("a", rate=1e-4), make_run("b", rate=2e-4), make_run("c", rate=2e-4)]
    names = group_names([RunRecord.read(f) for f in folders])
    assert [name for name, _ in names] == [
        "GDC++, learning_rate=0.0001",
        "GDC++, learning_rate=0.0002",
        "GDC++, learning_rate=0.0002",
    ]
    assert len(set(names)) == 3  # the same run twice is told apart by its folder
    alike = [make_run(name) for name in ("a/run", "b/run", "c/run")]
    assert len(set(group_names([RunRecord.read(f) for f in alike]))) == 3


def test_names_are_shown_as_they_are():
    """A pattern with two dollar signs is no formula."""
    pattern = r"^\d+$|^\w+$"
    figure, ax = figures.panel(f"Mean of {pattern}")
    for i, label in enumerate((pattern, "$5 to $9")):
        figures.draw_level(ax, i, label)
    figures.finish(ax)
    assert figures.to_data_uri(figure).startswith("data:image/svg+xml")
    assert ax.get_title(loc="left") == r"Mean of ^\d+\$|^\w+\$"


def test_a_condition_and_a_hard_constraint_are_explained(make_run):
    folder = make_run("run")
    plain = words_of(parsed(write_report(folder)[0])[0])
    assert "asked of every text" not in plain
    assert "meet a condition" not in plain
    target = json.loads((folder / "target.json").read_text(encoding="utf-8"))
    target["constraints"].append({"pointwise": "sports"})
    storage.write_json(folder / "target.json", target)
    config = RunConfig.load(folder / "config.yaml").to_mapping()
    config["constraints"] = [
        {"moment": {"gender": "female"}, "target": 0.5, "given": {"wordlist": "music"}}
    ]
    versions.write_config(folder, config)
    said = words_of(parsed(write_report(folder)[0])[0])
    assert "are of those texts that satisfy what is asked of every text" in said
    assert "condition · (feature − asked), which is to be 0" in said


def test_a_comparison_takes_two(make_run, tmp_path):
    with pytest.raises(ValueError, match="two run folders at least, got 1"):
        write_comparison([make_run("a")], tmp_path / "page.html")


def test_without_matplotlib_it_says_what_to_install(make_run, monkeypatch):
    monkeypatch.setattr("dmgen.report.figures.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'dmgen\[plots\]'"):
        write_report(make_run("run"))


def test_what_runs_do_not_share_is_not_drawn_for_all(make_run):
    """Of two targets neither is that of both runs, and a base is that of its own prompt."""
    first, other = make_run("a"), make_run("b")
    config = yaml.safe_load((other / "config.yaml").read_text(encoding="utf-8"))
    config["constraints"][0]["target"], config["prompt"] = 0.6, "She"
    versions.write_config(other, config)
    alike, differ = ([RunRecord.read(f) for f in pair] for pair in ((first, first), (first, other)))
    assert goals_of(alike) == {"female": 0.5}
    assert bases_of(alike).keys() == {"female"}
    assert goals_of(differ) == bases_of(differ) == {}
    labels = []
    for records in (alike, differ):
        (panel, *_) = Curves(records, [("GDC++", 0), ("GDC", 0)]).moments()
        labels.append(panel.figure.axes[0].get_legend_handles_labels()[1])
    assert "base" in labels[0]
    assert "base" not in labels[1]
    assert panel.caption == "Not all runs were asked the same of it."
