"""Models by name: folders, the hub, and the device of a process."""

import json
import shutil

import pytest
import torch
from transformers import GPT2LMHeadModel
from worlds import letters

from dmgen.models import CausalLM
from dmgen.models.hf import loading
from dmgen.models.hf.loading import default_device


class TestFolders:
    @pytest.fixture
    def folder(self, gpt2_lm, tmp_path):
        gpt2_lm.save_pretrained(tmp_path)
        return tmp_path

    def test_weights_are_never_unpickled(self, folder, gpt2_lm):
        (folder / "model.safetensors").unlink()
        torch.save(gpt2_lm.model.state_dict(), folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"could not load .*no file named model.safetensors"):
            CausalLM.from_pretrained(folder)

    def test_broken_weights(self, folder):
        (folder / "model.safetensors").write_bytes(b"not safetensors")
        with pytest.raises(ValueError, match="could not load"):
            CausalLM.from_pretrained(folder)

    def test_missing_weights_are_not_made_up(self, folder, gpt2_lm):
        model = GPT2LMHeadModel(gpt2_lm.model.config)
        name = "transformer.h.0.mlp.c_fc.weight"
        rest = {key: value for key, value in model.state_dict().items() if key != name}
        model.save_pretrained(folder, state_dict=rest)
        with pytest.raises(ValueError, match=f"lack {name}"):
            CausalLM.from_pretrained(folder)

    def test_weights_of_another_shape(self, folder):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["n_positions"] = 9
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(ValueError, match="could not load"):
            CausalLM.from_pretrained(folder)

    def test_a_tokenizer_without_eos(self, folder, gpt2_lm):
        letters("<s>", bos="<s>").save_pretrained(folder)
        with pytest.raises(ValueError, match=r"no EOS token.*set tokenizer.eos_token"):
            CausalLM.from_pretrained(folder)
        with pytest.raises(ValueError, match="no EOS token"):
            CausalLM(gpt2_lm.model, letters("<s>", bos="<s>"))

    def test_a_folder_without_its_tokenizer(self, folder):
        # transformers makes up an empty GPT-2 tokenizer instead of raising.
        for path in folder.glob("tokenizer*"):
            path.unlink()
        with pytest.raises(ValueError, match="tokenizer"):
            CausalLM.from_pretrained(folder)

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(ValueError, match=r"(?s)could not load .*save_pretrained"):
            CausalLM.from_pretrained(tmp_path)


class TestNames:
    @pytest.fixture
    def requests(self, monkeypatch):
        """Names asked for at a hub that cannot be reached."""
        names = []

        def unreachable(name, _):
            names.append(name)
            raise ConnectionError("no network in tests")

        monkeypatch.setattr(loading, "file_exists", unreachable)
        return names

    @pytest.mark.parametrize("name", ["/abs/nothing", "./nothing", "../nothing", "a/b/c", "~/x"])
    def test_a_path_that_is_not_there_is_not_sought_on_the_hub(self, name, requests):
        with pytest.raises(ValueError, match=f"could not load '{name}'.*neither a folder"):
            CausalLM.from_pretrained(name)
        assert requests == []

    def test_a_file_is_no_folder(self, tmp_path, requests):
        shutil.copy(__file__, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="neither a folder"):
            CausalLM.from_pretrained(tmp_path / "model.safetensors")
        assert requests == []

    @pytest.mark.parametrize("name", ["runs/nothing", "no-such-model-here"])
    def test_without_the_network_there_is_one_request_and_one_error(self, name, requests):
        with pytest.raises(
            ValueError, match=rf"(?s)could not load '{name}' \(no folder here.*save_pretrained"
        ):
            CausalLM.from_pretrained(name)
        assert requests == [name]

    def test_a_name_that_the_hub_does_not_know(self, monkeypatch):
        monkeypatch.setattr(loading, "file_exists", lambda name, file: False)
        with pytest.raises(ValueError, match="the hub has no such model"):
            CausalLM.from_pretrained("runs/nothing")


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert default_device() == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert default_device() == torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert default_device() == torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")


def test_the_default_dtype_of_torch_does_not_matter():
    torch.set_default_dtype(torch.float64)
    try:
        lm = CausalLM.from_pretrained("tiny-bios", device="cpu")
        samples = lm.sample(3, seed=0)
        gap = (lm.log_prob(samples) - samples.log_prob).abs().max()
    finally:
        torch.set_default_dtype(torch.float32)
    assert gap < 1e-3
