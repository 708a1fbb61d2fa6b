"""Loading of models and tokenizers by name."""

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
from transformers import AutoModelForCausalLM, AutoTokenizer

from dmgen.models.embedded import EMBEDDED
from dmgen.models.hf.tokenization import check_tokenizer


def load(name: str | Path, *, dtype: torch.dtype, trust_remote_code: bool) -> tuple[Any, Any]:
    """Return a model with weights in `dtype`, and its tokenizer; see `from_pretrained`."""
    source = str(EMBEDDED.get(str(name), name))
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


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Convert the errors of loading `name` to a ValueError that says what to do."""
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
    """Return whether the hub cannot be reached, by one request, so that the cache must do."""
    if Path(source).is_dir():
        return False
    if source.startswith((".", "~", "/")) or source.count("/") > 1 or Path(source).exists():
        raise ValueError("neither a folder nor a legal hub id")
    try:
        exists = file_exists(source, "config.json")
    except HfHubHTTPError:
        return False  # The hub answered with a refusal, which transformers explains.
    except Exception:  # The type depends on the HTTP library of huggingface_hub.
        return True
    if not exists:
        raise ValueError("the hub has no such model")
    return False


def default_device() -> torch.device:
    """Return the GPU of this process by its local rank, or the CPU if there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # A launcher may make only one GPU visible to each process.
    rank = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    return torch.device("cuda", rank)
