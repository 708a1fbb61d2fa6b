"""The size and the composition of forward passes: how many texts, which texts, in what order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmgen.models.hf.fast_layers import is_hooked
from dmgen.models.hf.output_rows import OutputRows
from dmgen.models.hf.tokenization import start_ids
from dmgen.models.samples import Samples

# Tokens of a forward pass that makes no logits; on a CPU, the states of a layer fit its cache.
_PASS_TOKENS, _PASS_TOKENS_ON_CPU = 2**13, 2**11
# Bytes of logits of a forward pass that makes them.
_LOGIT_BYTES = 2**27
# Larger numbers of rows are rounded up to a multiple of this. Libraries keep compiled code for each
# shape of a product (oneDNN in half precision: a third of a MiB), so that many shapes take memory.
_ROWS = 16
# Bytes of keys and values of the texts decoded side by side on a CPU; fraction of a GPU's memory.
_CACHE_BYTES, _CACHE_FRACTION = 2**30, 1 / 4


class Pass(NamedTuple):
    """The texts of one forward pass, which share a prompt."""

    start: Tensor  # ids before each text, long (L,)
    rows: Tensor  # positions of the n texts among all samples, long (n,)
    tokens: Tensor  # long (m, t), m >= n: the further rows make the shape a common one
    mask: Tensor  # bool (m, t), false in the further rows


def passes(
    model: Any,
    tokenizer: Any,
    samples: Samples,
    batch_size: int | None,
    *,
    chunked: bool,
    dtype: torch.dtype,
) -> Iterator[Pass]:
    """Yield forward passes over one prompt and texts of similar length, EOS where masked."""
    lengths = samples.n_tokens
    rows_of: dict[str, list[int]] = {}
    for i, prompt in enumerate(samples.prompts):
        rows_of.setdefault(prompt, []).append(i)
    for prompt, members in rows_of.items():
        longest_first = lengths[members].argsort(descending=True, stable=True)
        rows = torch.tensor(members)[longest_first]
        start = start_ids(model, tokenizer, prompt, int(lengths[rows[0]]))
        while len(rows):
            length = int(lengths[rows[0]])
            size = batch_size or texts_per_pass(model, len(start) + length, chunked=chunked)
            chosen, rows = rows[:size], rows[size:]
            n = len(chosen)
            n_more = min(n_computed_rows(n, start.device, dtype), size) - n
            padded = torch.nn.functional.pad(chosen, (0, n_more))
            tokens = samples.tokens[padded, :length].to(start.device)
            mask = samples.mask[padded, :length].to(start.device)
            mask[n:] = False
            yield Pass(start, chosen, tokens.masked_fill(~mask, tokenizer.eos_token_id), mask)


def texts_per_draw(model: Any, length: int, dtype: torch.dtype) -> int:
    """Return how many texts of `length` tokens, prompt included, to decode side by side."""
    device = next(model.parameters()).device
    n_bytes = _CACHE_BYTES
    if device.type == "cuda":
        n_bytes = int(_CACHE_FRACTION * torch.cuda.get_device_properties(device).total_memory)
    by_logits = _LOGIT_BYTES // (8 * vocab_size(model))
    by_cache = n_bytes // max(1, length * cache_bytes(model, dtype))
    return max(1, min(1024, by_logits, by_cache))


def cache_bytes(model: Any, dtype: torch.dtype) -> int:
    """Return an upper bound of the bytes of keys and values per token; 0 if it is unknown."""
    config = model.config.get_text_config()
    try:
        n_heads: int = config.num_attention_heads
        head_width = getattr(config, "head_dim", None) or config.hidden_size // n_heads
        n_key_heads = getattr(config, "num_key_value_heads", None) or n_heads
        return int(2 * config.num_hidden_layers * n_key_heads * head_width * dtype.itemsize)
    except (AttributeError, TypeError, ZeroDivisionError):
        return 0  # A model without such a cache, or with layers of several kinds.


def texts_per_pass(model: Any, length: int, *, chunked: bool) -> int:
    """Return how many texts of `length` tokens, prompt included, to score in one forward pass."""
    if chunked and linear_head(model) is not None:
        on_cpu = next(model.parameters()).device.type == "cpu"
        n = max(1, (_PASS_TOKENS_ON_CPU if on_cpu else _PASS_TOKENS) // length)
        return n if n < _ROWS else n - n % _ROWS
    return max(1, _LOGIT_BYTES // (4 * vocab_size(model) * length))


def n_computed_rows(n: int, device: torch.device, dtype: torch.dtype) -> int:
    """Return the rows that a pass of `n` texts is computed with, to meet few shapes."""
    if device.type != "cpu" or dtype == torch.float32:
        return n
    return round_up_rows(n) if n > _ROWS // 2 else 1 << (n - 1).bit_length()


def round_up_rows(n: int) -> int:
    """Return the next multiple of the number of rows that shapes are rounded to."""
    return -(-n // _ROWS) * _ROWS


def linear_head(model: Any) -> Any | None:
    """Return the output layer if it is a linear layer without hooks, else None."""
    head = model.get_output_embeddings()
    if type(head) not in (torch.nn.Linear, OutputRows) or model.base_model is model:
        return None
    return None if is_hooked(model) or is_hooked(head) else head


def vocab_size(model: Any) -> int:
    """Return the number of logits per position."""
    return int(model.config.get_text_config().vocab_size)
