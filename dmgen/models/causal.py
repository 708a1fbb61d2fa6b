"""`CausalLM`: a Hugging Face causal language model. The only file that knows transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer

from dmgen.models.base import Samples, draw_tokens, uniforms

TINY_BIOS = Path(__file__).parent / "tiny_bios"
# Logits of one forward pass take at most this many bytes unless a batch size is given.
_LOGIT_BYTES = 2**27


class CausalLM:
    """A Hugging Face causal language model as a distribution over texts.

    A text is at most `max_new_tokens` tokens after the prompt and ends with the tokenizer's EOS.
    Prompts are tokenised as the tokenizer does it; where that gives nothing (an empty prompt and no
    BOS added), the text starts after BOS, or EOS if there is no BOS: GPT-2's own convention.

    Sampling is ancestral at temperature 1 whatever the checkpoint's generation settings say, and
    dropout is off: importance weights need a deterministic law.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer; it must have an EOS.
        max_new_tokens: default length of a text, in tokens.
        dtype: precision of computing; trainable weights stay float32 whatever it is.

    Raises:
        ValueError: the tokenizer has no EOS.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int = 40,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer of {getattr(model.config, '_name_or_path', '') or 'this model'} has "
                "no EOS token, so a text could not end; set tokenizer.eos_token and save it again"
            )
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.dtype = dtype
        self.model = model.eval()
        self._freeze()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        max_new_tokens: int = 40,
        trust_remote_code: bool = False,
    ) -> CausalLM:
        """A frozen model from the package ("tiny-bios"), a local folder, or the hub.

        Args:
            name: "tiny-bios", a folder written by `save_pretrained`, or a hub id such as "gpt2".
            device: None takes CUDA where there is a device, else the CPU.
            dtype: precision of computing. None means float32: in bfloat16 the log-probability of a
                40-token text is off by 0.25 nats on average, which costs effective sample size.
            max_new_tokens: default length of a text, in tokens.
            trust_remote_code: run code that comes with the checkpoint; off unless asked for.

        Raises:
            ValueError: there is no such folder or model, its weights are not safetensors, or its
                tokenizer has no EOS.
        """
        source = str(TINY_BIOS if str(name) == "tiny-bios" else name)
        if not Path(source).is_dir() and (Path(source).is_absolute() or source.count("/") > 1):
            raise ValueError(
                f"no model folder at {source!r}; give a folder written by save_pretrained, "
                'a hub id such as "gpt2", or "tiny-bios" (embedded, needs no network)'
            )
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        compute = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=compute, trust_remote_code=trust_remote_code, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"could not load {str(name)!r}: {error}\nGive a folder written by save_pretrained "
                '(safetensors weights), a hub id such as "gpt2" (needs the network once), or '
                '"tiny-bios" (embedded, needs no network)'
            ) from error
        return cls(model.to(device), tokenizer, max_new_tokens=max_new_tokens, dtype=compute)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    def sample(
        self,
        n: int,
        *,
        prompt: str | Sequence[str] = "",
        max_new_tokens: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
    ) -> Samples:
        """`n` texts, with log-probabilities from the very logits that each token was drawn from.

        Args:
            n: number of texts.
            prompt: the text before; one prompt a call.
            max_new_tokens: longest text in tokens; None takes the model's own default.
            seed, generator: where the randomness comes from. Text i depends on row i of one block
                of uniforms only, not on `batch_size`.
            batch_size: texts decoded side by side; None chooses by memory.

        Raises:
            ValueError: the prompt and text do not fit the model's context, both seed and generator
                are given, or the model gives NaN.
        """
        length = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        start = self._prompt_ids(prompt, length)
        u = uniforms(n, length, seed=seed, generator=generator)
        size = batch_size or min(n, 1024, max(1, _LOGIT_BYTES // (8 * self._vocab_size)))
        with torch.no_grad(), self._computing():
            parts = [self._decode(start, part.to(self.device)) for part in u.split(size)]
        tokens = torch.cat([p[0] for p in parts]).cpu()
        log_prob = torch.cat([p[1] for p in parts]).cpu()
        is_eos = tokens == self.tokenizer.eos_token_id
        mask = (is_eos.cumsum(-1) - is_eos.long()) == 0
        return Samples(tokens, mask, log_prob, self._texts(tokens, mask & ~is_eos), [str(prompt)] * n)

    def log_prob(
        self, samples: Samples, *, batch_size: int | None = None, grad: bool = False
    ) -> Tensor:
        """Log-probability of each text in nats, float64 `(N,)`; see `token_log_prob`."""
        return self.token_log_prob(samples, batch_size=batch_size, grad=grad).sum(
            -1, dtype=torch.float64
        )

    def token_log_prob(
        self, samples: Samples, *, batch_size: int | None = None, grad: bool = False
    ) -> Tensor:
        """Log-probability of each stored token given the prompt and the tokens before it.

        Plainly: `log_softmax(logits)[token]`, teacher-forced, from float32 logits.

        Args:
            samples: what to score; the stored ids are scored, never the text tokenised again.
            batch_size: texts a forward pass; None chooses by memory.
            grad: keep the graph, on the model's device.

        Returns:
            float32 `(N, T)`, nats, 0 where masked; on the CPU unless `grad`.
        """
        width = samples.tokens.shape[1]
        size = batch_size or max(1, _LOGIT_BYTES // (4 * self._vocab_size * width))
        device = self.device
        parts, order = [], []
        with torch.set_grad_enabled(grad), self._computing():
            for prompt, rows in _rows_by_prompt(samples.prompts):
                start = self._prompt_ids(prompt, width)
                order += rows
                for chunk in torch.tensor(rows).split(size):
                    tokens = samples.tokens[chunk].to(device)
                    parts.append(self._score(start, tokens, samples.mask[chunk].to(device)))
        scored = torch.cat(parts)
        back = torch.tensor(order).argsort().to(device)
        return scored[back] if grad else scored[back].cpu()

    def copy(self) -> CausalLM:
        """An independent trainable copy: float32 weights, computing in the same `dtype`."""
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model).float()
        for parameter in other.model.parameters():
            parameter.requires_grad_(True)
        return other

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The parameters of the model, tied ones once."""
        yield from self.model.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """The weights by name, tied ones once."""
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over the weights of a model of the same shape."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state[name])

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a plain Hugging Face folder: `AutoModelForCausalLM.from_pretrained` loads it."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _freeze(self) -> None:
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    @property
    def _vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    def _computing(self) -> AbstractContextManager[object]:
        """Autocast where the weights are kept in a higher precision than that of computing."""
        if next(self.model.parameters()).dtype == self.dtype:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def _prompt_ids(self, prompt: str | Sequence[str], new_tokens: int) -> Tensor:
        """The ids before a text, `(L,)` with L >= 1; the one place where prompts become ids."""
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be one string, got {type(prompt).__name__}: {prompt!r}")
        ids = self.tokenizer(prompt)["input_ids"]
        if not ids:
            bos = self.tokenizer.bos_token_id
            ids = [self.tokenizer.eos_token_id if bos is None else bos]
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        # The last token of a text is drawn but never read, so it takes no position.
        if limit is not None and len(ids) + new_tokens - 1 > limit:
            raise ValueError(
                f"a prompt of {len(ids)} tokens and {new_tokens} new ones do not fit the model's "
                f"context of {limit}: use max_new_tokens <= {limit + 1 - len(ids)}"
            )
        return torch.tensor(ids, device=self.device)

    def _decode(self, start: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `(n, T)`, EOS after the end, and log-probabilities `(n,)` for uniforms `(n, T)`."""
        n, length = u.shape
        eos = self.tokenizer.eos_token_id
        tokens = torch.full((n, length), eos, device=u.device)
        log_prob = torch.zeros(n, dtype=torch.float64, device=u.device)
        cache = _roomy_cache(self.model.config, len(start) + length)
        alive = torch.arange(n, device=u.device)
        going = torch.ones_like(alive, dtype=torch.bool)
        inputs = start.expand(n, -1)
        for t in range(length):
            out = self.model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            drawn, drawn_log_prob = draw_tokens(out.logits[:, -1].float(), u[alive, t])
            # Finished rows that are still in the batch are decoded in vain.
            drawn = torch.where(going, drawn, eos)
            tokens[alive, t] = drawn
            log_prob[alive] += torch.where(going, drawn_log_prob, 0.0)
            going = drawn != eos
            # Dropping finished rows copies the cache, so wait until an eighth of them is finished.
            if t + 1 < length and int(going.sum()) <= 0.875 * len(alive):
                kept = going.nonzero().squeeze(-1)
                if len(kept) == 0:
                    break
                cache.reorder_cache(kept)
                alive, drawn, going = alive[kept], drawn[kept], going[kept]
            inputs = drawn.unsqueeze(-1)
        return tokens, log_prob

    def _score(self, start: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Teacher-forced log-probabilities `(n, T)`, float32, 0 where masked."""
        n, width = tokens.shape
        inputs = torch.cat([start.expand(n, -1), tokens[:, :-1]], dim=1)  # (n, L + T - 1)
        logits = self.model(inputs, use_cache=False, logits_to_keep=width).logits.float()
        chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        per_token = chosen - logits.logsumexp(-1)  # (n, T)
        return torch.where(mask, per_token, 0.0)

    def _texts(self, tokens: Tensor, shown: Tensor) -> list[str]:
        ids = [row[keep].tolist() for row, keep in zip(tokens, shown, strict=True)]
        return list(
            self.tokenizer.batch_decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A growing cache layer in a buffer of known length: no copy of the past at each token."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.used = 0

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            n, heads, _, width = key.shape
            self.lazy_initialization(key, value)
            self.key_buffer = key.new_empty(n, heads, self.length, width)
            self.value_buffer = value.new_empty(n, heads, self.length, value.shape[-1])
        start, self.used = self.used, self.used + key.shape[-2]
        self.key_buffer[:, :, start : self.used] = key
        self.value_buffer[:, :, start : self.used] = value
        self._show()
        return self.keys, self.values

    def reorder_cache(self, rows: Tensor) -> None:
        self.key_buffer = self.key_buffer[rows]
        self.value_buffer = self.value_buffer[rows]
        self._show()

    def _show(self) -> None:
        self.keys = self.key_buffer[:, :, : self.used]
        self.values = self.value_buffer[:, :, : self.used]


def _roomy_cache(config: Any, length: int) -> Any:
    """transformers' cache for `config`, with roomy layers where a layer just grows."""
    cache = DynamicCache(config=config)
    cache.layers = [_RoomyLayer(length) if type(x) is DynamicLayer else x for x in cache.layers]
    return cache


def _rows_by_prompt(prompts: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    yield from rows.items()
