"""`config.yaml` with the versions that a run's numbers depend on."""

import yaml

from dmgen.experiment import versions


def test_the_config_is_yaml_with_the_versions_as_comments(tmp_path):
    versions.write_config(tmp_path, {"learning_rate": 1e-4, "seed": 0, "name": "é"})
    text = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == {"learning_rate": 1e-4, "seed": 0, "name": "é"}
    assert "# torch " in text
    assert versions.read_versions(tmp_path / "config.yaml") == versions.versions()
    assert set(versions.versions()) >= {"python", "machine", "dmgen", "torch", "transformers"}
