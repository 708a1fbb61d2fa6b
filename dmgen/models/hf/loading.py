"""What `CausalLM` needs of transformers: models and tokenizers by name, a cache for decoding."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import file_exists
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY_BIOS = Path(__file__).parents[1] / "tiny_bios"


def load(name: str | Path, *, dtype: torch.dtype, trust_remote_code: bool) -> tuple[Any, Any]:
    """A model with weights in `dtype`, and its tokenizer: the package's, a folder's, or the hub's.

    Raises:
        ValueError: there is no such folder or model, its weights are not safetensors or not all
            there, or its tokenizer cannot end a text.
    """
    source = str(TINY_BIOS if str(name) == "tiny-bios" else name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with _loading(source):
        options["local_files_only"] = _only_cached(source)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    check_tokenizer(tokenizer)
    with _loading(source):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
        model, info = loaded
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:3])
            raise ValueError(f"its weights lack {missing}: they would be random numbers")
    return model, tokenizer


def check_tokenizer(tokenizer: Any) -> None:
    """Raises ValueError if a tokenizer can end no text, or write none."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, so a text could not end; "
            "set tokenizer.eos_token and save it again"
        )
    # Without tokenizer files in the folder transformers makes up an empty tokenizer, silently.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has special tokens only, so it can read and "
            "write no text; save the model's tokenizer into the same folder"
        )


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The ids before a text, at least one: as the tokenizer gives them, else BOS, else EOS."""
    ids = list(tokenizer(prompt)["input_ids"])
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    # Some tokenizers close what they read with an EOS; a text goes on where the prompt ends.
    own = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if ids[-1:] == [eos] and (not own or ids[-len(own) :] != own):
        ids.pop()
    return ids or [eos if bos is None else bos]


def texts_of(tokenizer: Any, tokens: Tensor, shown: Tensor) -> list[str]:
    """The text of the shown tokens of each row, both `(n, T)`."""
    ids = [row[keep].tolist() for row, keep in zip(tokens, shown, strict=True)]
    return list(
        tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turns what transformers raises while it loads `name` into one error that says what to do."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        kind = "" if Path(name).is_dir() else " (no folder here, so taken as a hub id)"
        raise ValueError(
            f"could not load {name!r}{kind}: {error}\nGive a folder written by save_pretrained "
            '(safetensors weights), a hub id such as "gpt2" (needs the network once), or '
            '"tiny-bios" (embedded, needs no network)'
        ) from error


def _only_cached(source: str) -> bool:
    """Whether a hub model must come from the local cache since the hub cannot be reached.

    One request that is not repeated: transformers itself goes on trying for most of a minute.

    Raises:
        ValueError: `source` is neither a folder here nor a model on the hub.
    """
    if Path(source).is_dir():
        return False
    if source.startswith((".", "~", "/")) or source.count("/") > 1 or Path(source).exists():
        raise ValueError("neither a folder nor a legal hub id")
    try:
        found = file_exists(source, "config.json")
    except HfHubHTTPError:
        return False  # The hub answered, with a refusal that transformers explains.
    except Exception:  # Which one depends on the HTTP library under huggingface_hub.
        return True
    if not found:
        raise ValueError("the hub has no such model")
    return False


def default_device() -> torch.device:
    """The GPU that a launcher gives this process, or the first one, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # A launcher may show each process one GPU alone.
    rank = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    return torch.device("cuda", rank)
