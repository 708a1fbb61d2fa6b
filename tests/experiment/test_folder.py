"""Run folders of other versions."""

import pytest

from dmgen.experiment.folder import load_config


@pytest.mark.parametrize(
    ("version", "base"), [("0.1.0", "tiny-bios-0.1"), ("0.2.0", "tiny-bios"), (None, "tiny-bios")]
)
def test_a_run_keeps_the_embedded_model_of_its_version(version, base, tmp_path):
    comment = "" if version is None else f"# dmgen {version}\n"
    text = "base: tiny-bios\nconstraints: [{pointwise: {wordlist: sports}}]\n"
    (tmp_path / "config.yaml").write_text(comment + text)
    (tmp_path / "target.json").write_text("{}")
    assert load_config(tmp_path).base == base
