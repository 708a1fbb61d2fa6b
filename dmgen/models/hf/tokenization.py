"""Conversion of prompts and texts to ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmgen.models.samples import Samples


def check_tokenizer(tokenizer: Any) -> None:
    """Raise ValueError if a tokenizer has no EOS token or only special tokens."""
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


def start_ids(model: Any, tokenizer: Any, prompt: str | Sequence[str], n_new_tokens: int) -> Tensor:
    """Return the ids before a text, long `(L,)`, L >= 1; refuse prompts that do not fit."""
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be one string, got {type(prompt).__name__}: {prompt!r}")
    ids = prompt_ids(tokenizer, prompt)
    # The last token of a text is drawn but never read, so it takes no position.
    n_positions = context_length(model)
    most = n_positions + 1 - len(ids)
    if n_new_tokens > most:
        remedy = f"use max_new_tokens <= {most}" if most > 0 else "use a shorter prompt"
        raise ValueError(
            f"a prompt of {len(ids)} tokens and {n_new_tokens} new ones do not fit the model's "
            f"context of {n_positions}: {remedy}"
        )
    return torch.tensor(ids, device=next(model.parameters()).device)


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Return the ids of a prompt, or if it has none that of BOS, or of EOS without a BOS."""
    ids = list(tokenizer(prompt)["input_ids"])
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    # Remove the EOS that some tokenizers append: the text follows the prompt directly.
    plain = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if ids[-1:] == [eos] and (not plain or ids[-len(plain) :] != plain):
        ids.pop()
    return ids or [eos if bos is None else bos]


def context_length(model: Any) -> int:
    """Return the number of positions of the model, or 2^31 where its configuration names none.

    Of "longrope", only the positions before its frequencies change count: they change for a whole
    forward pass at once, so that beyond them decoding and scoring use different distributions.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    limit = limit if limit is not None and limit > 0 else 2**31
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        limit = min(limit, rope.get("original_max_position_embeddings") or limit)
    return int(limit)


def texts_to_samples(model: Any, tokenizer: Any, texts: Sequence[str]) -> Samples:
    """Return texts as samples without a prompt, cut off at the context, for `CausalLM.embed`.

    An EOS follows each text, so that `hidden_states` include the state after its last token.
    """
    max_tokens = context_length(model) - len(prompt_ids(tokenizer, ""))
    ids = [
        tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for text in texts
    ]
    ids = [row[:max_tokens] for row in ids]
    n_tokens = torch.tensor([[len(row)] for row in ids])  # (N, 1)
    width = int(n_tokens.max()) + 1
    tokens = torch.tensor([row + [tokenizer.eos_token_id] * (width - len(row)) for row in ids])
    mask = torch.arange(width) <= n_tokens
    return Samples(
        tokens, mask, torch.zeros(len(ids), dtype=torch.float64), list(texts), [""] * len(ids)
    )


def texts_of(tokenizer: Any, tokens: Tensor, shown: Tensor) -> list[str]:
    """Return the text of the shown tokens of each row, both `(n, T)`, without special tokens."""
    ids = [row[keep].tolist() for row, keep in zip(tokens, shown, strict=True)]
    return list(
        tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )
