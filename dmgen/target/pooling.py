"""Texts of several models as one weighted sample of a base."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmgen.estimates import weights as log_weights
from dmgen.models.protocols import LanguageModel
from dmgen.models.samples import Samples


def pool(
    drawn: Sequence[tuple[LanguageModel, Samples]],
    base: LanguageModel,
    prompt: str,
    max_new_tokens: int,
) -> tuple[Samples, Tensor, Tensor]:
    """Return all texts, log a/m of each, and the number of the model that drew it, `(N,)`.

    m is the mixture of the models in proportion to their numbers of texts (balance heuristic).

    Args:
        drawn: models with the texts that each of them drew. Every text is scored under every model.
        base: the language model a; it may be one of the models.
        prompt: the prompt that the texts must have.
        max_new_tokens: the longest length that the texts must have, tokens.

    Raises:
        ValueError: drawn is empty, or texts have another prompt or another longest length.
    """
    if not drawn:
        raise ValueError("refit needs at least one (model, samples)")
    parts = [part for _, part in drawn]
    pooled = Samples.cat(parts)
    if set(pooled.prompts) != {prompt}:
        raise ValueError(
            f"the target's prompt is {prompt!r}, but the samples continue "
            f"{sorted(set(pooled.prompts))}: draw them with prompt=target.prompt"
        )
    lengths = sorted({part.tokens.shape[1] for part in parts})
    if lengths != [max_new_tokens]:
        raise ValueError(
            f"the target's texts have at most {max_new_tokens} tokens, but the samples "
            f"were drawn with at most {lengths}: draw them with "
            "max_new_tokens=target.max_new_tokens"
        )
    # Under the model that drew it, the log-probability of a text is recorded and exact.
    columns = [
        torch.cat([s.log_prob if i == m else model.log_prob(s) for i, s in enumerate(parts)])
        for m, (model, _) in enumerate(drawn)
    ]
    recorded = [c for c, (model, _) in zip(columns, drawn, strict=True) if model is base]
    log_base = recorded[0] if recorded else base.log_prob(pooled)
    counts = torch.tensor([len(part) for part in parts])
    log_w = log_weights.balance_heuristic(log_base, torch.stack(columns, dim=1), counts)
    return pooled, log_w, torch.arange(len(parts)).repeat_interleave(counts)
