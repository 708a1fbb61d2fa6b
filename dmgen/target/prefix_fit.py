"""The fit of a `PrefixValue`, and the two small networks it consists of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dmgen.models.random_draws import stream
from dmgen.models.samples import Samples
from dmgen.target.ebm import EBM
from dmgen.validation import check_integer

# Dimensions of the sum, hidden units of the networks u and v, and of the projected state.
_K, _HIDDEN_U, _HIDDEN_V, _STATE = 3, 16, 32, 16
_POSITION = 3
_BATCH = 128
# Weight of the group lasso, in texts; effects below this fraction of the largest are set to 0.
_LASSO, _NEGLIGIBLE = 10.0, 0.1
# Evidence, in nats, that a pair of tokens changes the factor unlike its last token does.
_PAIR_NATS = 4.0
# The smallest value, as a fraction of the largest: a hard constraint makes no text impossible for
# p̂, since the value may be wrong.
_FLOOR = 1e-3


def fit(
    target: EBM, n_texts: int, n_labelled: int | None, n_heldout: int, seed: int
) -> dict[str, Tensor]:
    """Return the fields of `PrefixValue`, see `PrefixValue.fit`."""
    check_integer("n_texts", n_texts, least=2)
    check_integer("n_heldout", n_heldout, least=0)
    texts = texts_of_fit(target)
    base: Any = target.base
    generator = stream("prefix value", seed)
    low, high, share = _scaled_factor(target, texts)
    used, weights = _thinned(share[: len(texts) - n_heldout], n_texts, generator)
    chosen = texts[used]
    labels = _prefix_labels(target, chosen, (low, high), n_labelled)
    sums = _fit_sums(chosen, labels, weights, base, generator)
    hidden = base.hidden_states(chosen)
    value = _fit_value(chosen, hidden, share[used], weights, sums, generator, target)
    eos = base.eos_id
    result = sums | value
    if eos is not None:
        result["candidates"] = torch.cat([sums["candidates"], torch.tensor([eos])])
        zero = sums["token_effects"].new_zeros(1, _K)
        result["token_effects"] = torch.cat([sums["token_effects"], zero])
    result["bounds"] = torch.tensor([low, high])
    sizes = [base.vocab_size, target.max_new_tokens, -1 if eos is None else eos]
    result["sizes"] = torch.tensor(sizes)
    return result


def texts_of_fit(target: EBM) -> Samples:
    """Return the base's texts that λ was fitted on, or raise ValueError if there are none."""
    if target.fit_samples is None:
        raise ValueError(
            "a prefix value is fitted on the texts that λ was fitted on, and this target has none: "
            "make it by EBM.fit(base, ...) without a proposal"
        )
    return target.fit_samples


def heldout_inputs(target: EBM, n_heldout: int, bounds: Tensor) -> tuple[Samples, Tensor, Tensor]:
    """Return the last texts of the fit, where they go on, and their scaled factor at each token."""
    texts = texts_of_fit(target)
    texts = texts[len(texts) - n_heldout :]
    low, high = bounds.tolist()
    share = _scaled(torch.exp(target.log_factor(target.values(texts))), low, high)
    goes_on = texts.mask & ~_is_last(texts.mask)
    return texts, goes_on, share.unsqueeze(-1).expand(goes_on.shape)


# A network is one tensor, a row a hidden unit: weights of its inputs, its bias, its weight in the
# output, and in the first row the output's bias.
def final_logit(net: Tensor, sums: Tensor) -> Tensor:
    """Return u of sums `(..., k)`, `(...)`."""
    k = sums.shape[-1]
    inner, bias, outer = net[:, :k], net[:, k], net[:, k + 1]
    return torch.tanh(sums @ inner.T + bias) @ outer + net[0, k + 2]


def value_logit(
    net: Tensor, sums: Tensor, final: Tensor, state: Tensor, position: Tensor, length: int
) -> Tensor:
    """Return v, `(...)`, from sums `(..., k)`, u `(...)`, projected states and positions."""
    t = ((position + 1) / length).unsqueeze(-1).to(sums)
    inputs = [sums, (2 * torch.tanh(final / 4)).unsqueeze(-1), t, t * t, t.sqrt()]
    k = sums.shape[-1] + 1 + _POSITION
    width = k + state.shape[-1]
    inner, bias, outer = net[:, :width], net[:, width], net[:, width + 1]
    shape = (*sums.shape[:-1], _POSITION)
    known = torch.cat([*inputs[:2], torch.cat(inputs[2:], -1).expand(shape)], -1)
    # The state does not depend on the token that follows, so its part is computed once for all.
    hidden = known @ inner[:, :k].T + state @ inner[:, k:].T + bias
    return torch.tanh(hidden) @ outer + net[0, width + 2]


def projected(projection: Tensor, hidden: Tensor) -> Tensor:
    """Return the projection of normalised states `(..., D)`, `(..., r)`."""
    hidden = hidden.float()
    normalised = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:])
    return normalised @ projection.T


def pair_effects(keys: Tensor, effects: Tensor, wanted: Tensor) -> Tensor:
    """Return the effect of each wanted pair, `(..., k)`; 0 for pairs without one."""
    zero = effects.new_zeros(1, effects.shape[1])
    return torch.cat([effects, zero])[places(keys, wanted)]


def places(ascending: Tensor, wanted: Tensor) -> Tensor:
    """Return the position of each wanted number, or their count where it is none of them."""
    if not len(ascending):
        return torch.zeros_like(wanted)
    place = torch.searchsorted(ascending, wanted.contiguous()).clamp(max=len(ascending) - 1)
    return torch.where(ascending[place] == wanted, place, len(ascending))


def _scaled_factor(target: EBM, texts: Samples) -> tuple[float, float, Tensor]:
    """Return the range of the factor over texts and each text's place in it, 0..1, `(N,)`."""
    factors = torch.exp(target.log_factor(target.values(texts)))
    high = float(factors.max())
    low = max(float(factors.min()), _FLOOR * high)
    if high <= low:
        raise ValueError(
            f"every one of {len(texts):,} texts has the factor {high:g}: there is nothing to learn"
        )
    return low, high, _scaled(factors, low, high)


def _scaled(factors: Tensor, low: float, high: float) -> Tensor:
    """Return each factor's place in the range, 0..1."""
    return ((factors - low) / (high - low)).clamp(0, 1).float()


def _thinned(share: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return positions of about `n` texts, with probability ∝ 1 + share/mean, and 1/probability."""
    size = 1 + share / share.mean()
    keep = (n * size / size.sum()).clamp(max=1.0)
    keep = torch.where(keep < 1, keep * ((n - (keep >= 1).sum()) / keep[keep < 1].sum()), keep)
    keep = keep.clamp(max=1.0)
    chosen = (torch.rand(len(share), generator=generator) < keep).nonzero().squeeze(-1)
    return chosen, 1 / keep[chosen]


def _prefix_labels(
    target: EBM, texts: Samples, bounds: tuple[float, float], n_labelled: int | None
) -> Tensor:
    """Return the scaled factor of each prefix `(N, T)`, NaN where it is not evaluated."""
    low, high = bounds
    labels = torch.full(texts.tokens.shape, math.nan)
    rows = texts.mask.clone()
    if n_labelled is not None:
        rows[n_labelled:] = False
        rows |= _is_last(texts.mask)
    where = rows.nonzero()
    if not len(where):
        return labels
    shown = torch.arange(texts.tokens.shape[1]) <= where[:, 1:]  # (M, T)
    base: Any = target.base
    decoded = base.decode(texts.tokens[where[:, 0]], shown)
    unique = list(dict.fromkeys(decoded))
    place = {text: i for i, text in enumerate(unique)}
    prompts = [target.prompt] * len(unique)
    # Not by `target.values`: so many texts would push all others out of its cache.
    values = {f.name: f.evaluate(unique, prompts)[0] for f in target.features}
    scaled = _scaled(torch.exp(target.log_factor(values)), low, high)
    labels[where[:, 0], where[:, 1]] = scaled[[place[text] for text in decoded]]
    return labels


def _is_last(mask: Tensor) -> Tensor:
    """Return where each text ends, bool `(N, T)`."""
    last = torch.zeros_like(mask)
    last[torch.arange(len(mask)), mask.sum(1) - 1] = True
    return last


def _fit_sums(
    texts: Samples, labels: Tensor, weights: Tensor, base: Any, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return candidates, effects and the network u, fitted to the labels of incomplete texts."""
    vocab, tokens = base.vocab_size, texts.tokens
    keys = _keys(tokens, vocab)
    pairs, often = _screened(keys, tokens, labels, texts.mask, vocab)
    effects = (0.01 * torch.randn(vocab, _K, generator=generator)).requires_grad_()
    of_pairs = torch.zeros(len(pairs) + 1, _K, requires_grad=True)
    net = torch.randn(_HIDDEN_U, _K + 3, generator=generator) / math.sqrt(_K)
    net[:, _K + 2] = 0
    parameters = [effects, of_pairs, net.requires_grad_()]
    inputs = (tokens, places(pairs, keys), labels, weights.sqrt())
    _adam(parameters, _sums_loss(parameters, inputs, base, _LASSO), len(texts), 8, 1e-2, generator)
    with torch.no_grad():
        size = effects.norm(dim=1)
        kept = (size > _NEGLIGIBLE * size.max()) | often
        effects[~kept] = 0
    effects.register_hook(lambda grad: grad * kept.unsqueeze(-1))  # type: ignore[no-untyped-call]
    _adam(parameters, _sums_loss(parameters, inputs, base, 0.0), len(texts), 15, 2e-2, generator)
    kept[pairs % vocab] = True
    if base.eos_id is not None:
        kept[base.eos_id] = False
    ids = kept.nonzero().squeeze(-1)
    return {
        "candidates": ids,
        "token_effects": effects.detach()[ids],
        "pair_keys": pairs,
        "pair_effects": of_pairs.detach()[:-1].clone(),
        "final_net": net.detach(),
    }


def _sums_loss(
    parameters: list[Tensor], inputs: tuple[Tensor, ...], base: Any, lasso: float
) -> Callable[[Tensor], Tensor]:
    """Return the loss of rows: the cross-entropy of labels under u, and a group lasso."""
    effects, of_pairs, net = parameters
    tokens, place, labels, weights = inputs
    known = ~labels.isnan()
    labels = labels.nan_to_num()
    # An EOS adds nothing: the text that it ends keeps its factor.
    adds = torch.ones(tokens.shape) if base.eos_id is None else (tokens != base.eos_id).float()

    def loss(rows: Tensor) -> Tensor:
        is_pair = place[rows] < len(of_pairs) - 1
        added = effects[tokens[rows]] + of_pairs[place[rows]] * is_pair.unsqueeze(-1)
        added = added * adds[rows].unsqueeze(-1)
        terms = torch.nn.functional.binary_cross_entropy_with_logits(
            final_logit(net, added.cumsum(1)), labels[rows], reduction="none"
        )
        weight = known[rows] * weights[rows].unsqueeze(-1)
        fitted = (terms * weight).sum() / weight.sum().clamp(min=1)
        size = effects.norm(dim=1).sum() + of_pairs.norm(dim=1).sum()
        penalised: Tensor = fitted + lasso / len(tokens) * size
        return penalised

    return loss


def _keys(tokens: Tensor, vocab: int) -> Tensor:
    return torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=vocab) * vocab + tokens


def _screened(
    keys: Tensor, tokens: Tensor, labels: Tensor, mask: Tensor, vocab: int
) -> tuple[Tensor, Tensor]:
    """Return the pairs that change the label unlike their last token, and tokens that often do."""
    before = torch.nn.functional.pad(labels[:, :-1], (1, 0))
    before[:, 0] = labels[:, 0].nan_to_num().min()
    observed = mask & ~labels.isnan() & ~before.isnan()
    changed = observed & ((labels - before).abs() > 1e-6)
    n_seen = torch.bincount(tokens[observed], minlength=vocab).float()
    n_changed = torch.bincount(tokens[changed], minlength=vocab).float()
    rates = n_changed / n_seen.clamp(min=1)
    pairs, count = torch.unique(keys[observed], return_counts=True)
    hits = torch.zeros(len(pairs))
    changed_pairs, n = torch.unique(keys[changed], return_counts=True)
    hits[torch.searchsorted(pairs, changed_pairs)] = n.float()
    own, general, small = hits / count.clamp(min=1), rates[pairs % vocab], 1e-3
    evidence = hits * torch.log((own + small) / (general + small))
    evidence += (count - hits) * torch.log((1 - own + small) / (1 - general + small))
    unlike = (evidence > _PAIR_NATS) & (count >= 2) & (n_changed[pairs % vocab] > 0)
    return pairs[unlike], (n_changed >= 2) & (rates > 0.2)


def _fit_value(
    texts: Samples,
    hidden: Tensor,
    share: Tensor,
    weights: Tensor,
    sums: dict[str, Tensor],
    generator: torch.Generator,
    target: EBM,
) -> dict[str, Tensor]:
    """Return the network v and the projection, fitted to the factor of the finished text."""
    base: Any = target.base
    vocab, tokens = base.vocab_size, texts.tokens
    table = torch.zeros(vocab, _K)
    table[sums["candidates"]] = sums["token_effects"]
    of_pairs = pair_effects(sums["pair_keys"], sums["pair_effects"], _keys(tokens, vocab))
    summed = (table[tokens] + of_pairs).cumsum(1)
    final = final_logit(sums["final_net"], summed)
    width = _K + 1 + _POSITION + _STATE
    net = torch.randn(_HIDDEN_V, width + 3, generator=generator) / math.sqrt(width)
    net[:, width + 2] = 0
    projection = 0.1 * torch.randn(_STATE, hidden.shape[-1], generator=generator)
    projection /= math.sqrt(hidden.shape[-1])
    parameters = [net.requires_grad_(), projection.requires_grad_()]
    inner = texts.mask & ~_is_last(texts.mask)
    position = torch.arange(tokens.shape[1])

    def loss(rows: Tensor) -> Tensor:
        state = projected(projection, hidden[rows])
        logit = value_logit(net, summed[rows], final[rows], state, position, target.max_new_tokens)
        terms = torch.nn.functional.binary_cross_entropy_with_logits(
            logit, share[rows].unsqueeze(-1).expand_as(logit), reduction="none"
        )
        weight = inner[rows] * weights[rows].unsqueeze(-1)
        return (terms * weight).sum() / weight.sum().clamp(min=1)

    _adam(parameters, loss, len(texts), 10, 5e-3, generator, decay=(1e-2, 1.0))
    return {"value_net": net.detach(), "projection": projection.detach()}


def _adam(
    parameters: list[Tensor],
    loss: Callable[[Tensor], Tensor],
    n: int,
    n_epochs: int,
    rate: float,
    generator: torch.Generator,
    decay: tuple[float, ...] = (),
) -> None:
    """Minimise the loss of random batches of rows, with warm-up and cosine decay."""
    decays = decay or (0.0,) * len(parameters)
    groups = [{"params": [p], "weight_decay": d} for p, d in zip(parameters, decays, strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99))
    batch = min(_BATCH, n)
    n_steps, step = n_epochs * (n // batch), 0
    for _ in range(n_epochs):
        order = torch.randperm(n, generator=generator)
        for rows in torch.split(order, batch)[: n // batch]:
            share = min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / n_steps))
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.zero_grad()
            with torch.enable_grad():
                torch.autograd.backward(loss(rows))
            optimizer.step()
            step += 1
