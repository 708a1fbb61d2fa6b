"""Forward passes of a causal transformer: decoding with a cache, hidden states, and scoring."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from dmgen.models.hf.chunked_log_softmax import chosen_log_prob
from dmgen.models.hf.fast_layers import is_hooked
from dmgen.models.hf.kv_cache import roomy_cache
from dmgen.models.random_draws import draw_tokens, uniforms

# Tokens in one forward pass that makes no logits, on a CPU few enough that the states of a layer
# stay in its cache; bytes of the logits in one that does.
_PASS_TOKENS, _PASS_TOKENS_ON_CPU = 2**13, 2**11
_LOGIT_BYTES = 2**27
# Texts in a pass, and states before the output layer, come in multiples of so many where there are
# more. Of each shape of a product a library may keep code of its own (oneDNN in half precision: a
# third of a MiB), so that ever new shapes take ever more memory as a run goes on.
_ROWS = 16
# Bytes of keys and values of all texts that are decoded side by side, on a CPU; the share of a GPU.
_CACHE_BYTES, _CACHE_SHARE = 2**30, 1 / 4


def check(model: Any, eos: int, dtype: torch.dtype) -> bool:
    """Whether scores may be `chunked`; refuses a model whose cached decoding scoring does not see.

    Args:
        model: a causal language model of transformers.
        eos: the token that ends a text.
        dtype: precision of computing.

    Raises:
        ValueError: the model cannot write `eos`, or is no causal transformer.
    """
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    if eos >= _vocab_size(model):
        raise ValueError(
            f"the tokenizer's EOS has id {eos}, but {name} has {_vocab_size(model)} tokens, so a "
            "text could not end; resize the model's embeddings or use the tokenizer it was "
            "trained with"
        )
    # An unused cache or attention to later tokens costs several nats, rounding in 16 bits some
    # tenths, in float32 less than a thousandth.
    allowed = 0.05 if dtype == torch.float32 else 1.0
    start = torch.tensor([eos], device=next(model.parameters()).device)
    u = uniforms(32, min(8, context(model)), seed=0, generator=None).to(start.device)
    tokens, drawn = decode(model, start, u, eos)
    mask = up_to(eos, tokens)
    scored = score(model, start, tokens, mask, chunked=False)
    gap = (scored.sum(-1) - drawn).abs().max().item()
    if gap > allowed:
        raise ValueError(
            f"{name} gives texts of {u.shape[1]} tokens log-probabilities that differ by "
            f"{gap:.1f} nats between cached decoding and scoring: it is not causal, or keeps "
            "its past elsewhere than in past_key_values; use a decoder-only transformer"
        )
    if not logits_are_linear(model, tokens[:1], dtype):
        return False
    chunked = score(model, start, tokens, mask, chunked=True)
    return bool(((chunked - scored).sum(-1).abs() <= allowed).all())


def decode(model: Any, start: Tensor, u: Tensor, eos: int) -> tuple[Tensor, Tensor]:
    """Texts after the ids `start`, ancestrally, with their log-probability.

    Args:
        model: a causal language model of transformers.
        start: long `(L,)`.
        u: float64 `(n, T)`, uniform in [0, 1): row i makes text i.
        eos: the token that ends a text.

    Returns:
        Tokens `(n, T)`, EOS after the end, and float64 `(n,)` nats.
    """
    n, length = u.shape
    tokens = torch.full((n, length), eos, device=u.device)
    log_prob = torch.zeros(n, dtype=torch.float64, device=u.device)
    cache = roomy_cache(model.config, len(start) + length)
    past = {_cache_argument(model): cache, "use_cache": True, "logits_to_keep": 1}
    if len(start) > 1:
        # All texts share the prompt: it is read once.
        model(start[None, :-1], **past)
        cache.reorder_cache(torch.zeros(n, dtype=torch.long, device=u.device))
    alive = torch.arange(n, device=u.device)
    going = torch.ones_like(alive, dtype=torch.bool)
    inputs = start[-1:].expand(n, -1)
    for t in range(length):
        out = model(inputs, **past)
        drawn, drawn_log_prob = draw_tokens(out.logits[:, -1], u[alive, t])
        # Finished rows that are still in the batch are decoded in vain.
        drawn = torch.where(going, drawn, eos)
        tokens[alive, t] = drawn
        log_prob[alive] += torch.where(going, drawn_log_prob, 0.0)
        going = drawn != eos
        n_going = int(going.sum())
        if n_going == 0:
            break
        # Dropping finished rows copies the cache, so wait until an eighth of them can go.
        n_kept = _rounded_up(n_going)
        if t + 1 < length and n_kept <= 0.875 * len(alive):
            kept = going.argsort(descending=True, stable=True)[:n_kept]
            cache.reorder_cache(kept)
            alive, drawn, going = alive[kept], drawn[kept], going[kept]
        inputs = drawn.unsqueeze(-1)
    return tokens, log_prob


def up_to(eos: int, tokens: Tensor) -> Tensor:
    """True up to and with the first `eos` of each row, `(n, T)`."""
    is_eos = tokens == eos
    return (is_eos.cumsum(-1) - is_eos.long()) == 0


def states(model: Any, start: Tensor, tokens: Tensor) -> Tensor:
    """The last hidden state before each token, `(n, T, D)`, teacher-forced."""
    found: Tensor = model.base_model(_inputs(start, tokens), use_cache=False).last_hidden_state
    return found[:, -tokens.shape[1] :]


def score(model: Any, start: Tensor, tokens: Tensor, mask: Tensor, *, chunked: bool) -> Tensor:
    """Log-probability of each token given those before it, float32 `(n, T)`, 0 where masked.

    Plainly: `log_softmax(logits)[token]`, teacher-forced, from the model's own logits in float32.
    `chunked` says that these are the output layer's linear map of `states`; then those of a block
    of the vocabulary are computed at a time, and for unmasked positions only.
    """
    if chunked and linear_head(model) is not None:
        return score_states(model, states(model, start, tokens), tokens, mask)
    logits = model(_inputs(start, tokens), use_cache=False, logits_to_keep=tokens.shape[1]).logits
    logits = logits.float()
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return torch.where(mask, chosen - logits.logsumexp(-1), 0.0)


def score_states(model: Any, hidden: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """`score` from the states before each token, `(n, t, D)`, through the output layer alone."""
    head = model.get_output_embeddings()
    rows = mask.flatten().nonzero().squeeze(-1)
    n = len(rows)
    rows = torch.nn.functional.pad(rows, (0, _rounded_up(n) - n))
    found = chosen_log_prob(
        hidden.flatten(0, 1)[rows], head.weight, head.bias, tokens.flatten()[rows]
    )
    scored = torch.zeros(mask.shape, dtype=found.dtype, device=mask.device)
    return scored.masked_scatter(mask, found[:n])


def texts_a_draw(model: Any, length: int, dtype: torch.dtype) -> int:
    """Texts of `length` tokens, prompt included, that there is memory to decode side by side."""
    device = next(model.parameters()).device
    room = _CACHE_BYTES
    if device.type == "cuda":
        room = int(_CACHE_SHARE * torch.cuda.get_device_properties(device).total_memory)
    by_logits = _LOGIT_BYTES // (8 * _vocab_size(model))
    by_cache = room // max(1, length * cache_bytes(model, dtype))
    return max(1, min(1024, by_logits, by_cache))


def cache_bytes(model: Any, dtype: torch.dtype) -> int:
    """Bytes of keys and values of a token, at most; 0 where the configuration does not tell."""
    config = model.config.get_text_config()
    try:
        n_heads: int = config.num_attention_heads
        head_width = getattr(config, "head_dim", None) or config.hidden_size // n_heads
        n_key_heads = getattr(config, "num_key_value_heads", None) or n_heads
        return int(2 * config.num_hidden_layers * n_key_heads * head_width * dtype.itemsize)
    except (AttributeError, TypeError, ZeroDivisionError):
        return 0  # A model without such a cache, or with layers of several kinds.


def texts_a_pass(model: Any, length: int, *, chunked: bool) -> int:
    """Texts of `length` tokens that one forward pass has memory for."""
    if chunked and linear_head(model) is not None:
        on_cpu = next(model.parameters()).device.type == "cpu"
        n = max(1, (_PASS_TOKENS_ON_CPU if on_cpu else _PASS_TOKENS) // length)
        return n if n < _ROWS else n - n % _ROWS
    return max(1, _LOGIT_BYTES // (4 * _vocab_size(model) * length))


def rows_computed(n: int, device: torch.device, dtype: torch.dtype) -> int:
    """Rows that a pass of `n` texts is computed with, see `_ROWS`; those of no text are masked."""
    if device.type != "cpu" or dtype == torch.float32:
        return n
    return _rounded_up(n) if n > _ROWS // 2 else 1 << (n - 1).bit_length()


def linear_head(model: Any) -> torch.nn.Linear | None:
    """The output layer, if it is a plain linear one and no hook changes what comes out of it."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or model.base_model is model:
        return None
    return None if is_hooked(model) or is_hooked(head) else head


def logits_are_linear(model: Any, inputs: Tensor, dtype: torch.dtype) -> bool:
    """Whether the model's logits are its output layer's linear map of the trunk's last states.

    Some models cap, scale or transform one of them, and small logits would not show it: the model
    is made to go on from states that give logits of some 30 nats.

    Args:
        model: a causal language model of transformers.
        inputs: ids that it can read, `(n, T)`.
        dtype: precision of computing.
    """
    head = linear_head(model)
    if head is None:
        return False
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(*inputs.shape, head.in_features, generator=generator).to(head.weight)
    given *= 30 / head(given).float().std()

    def replace(module: Any, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = given
        return output

    handle = model.base_model.register_forward_hook(replace)
    try:
        found = model(inputs, use_cache=False).logits.float()
    except (AttributeError, TypeError):  # The trunk gives something else than its last states.
        return False
    finally:
        handle.remove()
    expected = head(given).float()
    # The same products twice, so they differ by rounding alone.
    error = 8 * torch.finfo(dtype).eps * expected.abs().max()
    return found.shape == expected.shape and bool(((found - expected).abs() <= error).all())


def context(model: Any) -> int:
    """Positions that the model has; practically endless where its configuration names none.

    Of "longrope" only those before its frequencies change: they change for a whole pass at once,
    so beyond that a text has another law when it is scored than while it is decoded.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    limit = limit if limit is not None and limit > 0 else 2**31
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        limit = min(limit, rope.get("original_max_position_embeddings") or limit)
    return int(limit)


def _cache_argument(model: Any) -> str:
    """What the model's forward calls its cache: transformers renames it in the course of 5.x."""
    for kind in type(model).__mro__:
        forward = vars(kind).get("forward")
        known = inspect.signature(forward).parameters if forward else {}
        for name in ("cache", "past_key_values"):
            if name in known:
                return name
    return "past_key_values"


def _rounded_up(n: int) -> int:
    return -(-n // _ROWS) * _ROWS


def _vocab_size(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _inputs(start: Tensor, tokens: Tensor) -> Tensor:
    """What the model reads to predict `tokens`, `(n, L + T - 1)`."""
    return torch.cat([start.expand(len(tokens), -1), tokens[:, :-1]], dim=1)
