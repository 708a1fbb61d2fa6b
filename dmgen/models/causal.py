"""`CausalLM`: a Hugging Face causal language model. The only file that knows transformers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import file_exists
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, cache_utils

from dmgen.models.base import Samples, draw_tokens, refuse_nan, uniforms

TINY_BIOS = Path(__file__).parent / "tiny_bios"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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
        dtype: precision of computing; None takes that of the weights. Trainable weights stay
            float32 whatever it is.

    Raises:
        ValueError: the tokenizer has no EOS or one that the model cannot write, the weights are
            narrower than `dtype`, or the model's cached decoding disagrees with its scoring (no
            causal transformer, or a cache of its own kind).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int = 40,
        dtype: torch.dtype | None = None,
    ) -> None:
        weights = next(model.parameters()).dtype
        dtype = weights if dtype is None else dtype
        _check_settings(tokenizer, max_new_tokens, dtype)
        if weights not in (dtype, torch.float32):
            raise ValueError(
                f"the weights are {weights}, so the model cannot compute in {dtype}; load it with "
                f"dtype={dtype} or use CausalLM.from_pretrained"
            )
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.dtype = dtype
        self.model = model.eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self._check_model()

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
            ValueError: there is no such folder or model, its weights are not safetensors or not all
                there, its tokenizer has no EOS, or `dtype` is none of the three.
        """
        source = str(TINY_BIOS if str(name) == "tiny-bios" else name)
        compute: Any = dtype or torch.float32
        if isinstance(compute, str):
            compute = getattr(torch, compute, compute)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        with _loading(source):
            options["local_files_only"] = _only_cached(source)
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        _check_settings(tokenizer, max_new_tokens, compute)
        with _loading(source):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=compute, use_safetensors=True, output_loading_info=True, **options
            )
            model, info = loaded
            if info["missing_keys"]:
                missing = ", ".join(sorted(info["missing_keys"])[:3])
                raise ValueError(f"its weights lack {missing}: they would be random numbers")
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
                are given, a size is not positive, or the model gives NaN.
        """
        length = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        start = self._prompt_ids(prompt, length)
        u = uniforms(n, length, seed=seed, generator=generator)
        size = _batch_size(batch_size, min(n, 1024, _LOGIT_BYTES // (8 * self._vocab_size)))
        with torch.no_grad(), self._computing():
            parts = [self._decode(start, part.to(self.device)) for part in torch.split(u, size)]
        tokens = torch.cat([p[0] for p in parts]).cpu()
        log_prob = torch.cat([p[1] for p in parts]).cpu()
        is_eos = tokens == self.tokenizer.eos_token_id
        mask = (is_eos.cumsum(-1) - is_eos.long()) == 0
        return Samples(
            tokens, mask, log_prob, self._texts(tokens, mask & ~is_eos), [str(prompt)] * n
        )

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

        Raises:
            ValueError: a prompt and its longest text do not fit the model's context, `batch_size`
                is not positive, or the model gives NaN.
        """
        width, device = samples.tokens.shape[1], self.device
        parts, order = [torch.zeros(0, width, device=device)], []
        with torch.set_grad_enabled(grad), self._computing():
            for prompt, rows in _rows_by_prompt(samples.prompts):
                group = samples[rows]
                used = group.longest
                start = self._prompt_ids(prompt, used)
                order += rows
                size = _batch_size(batch_size, _LOGIT_BYTES // (4 * self._vocab_size * used))
                for part in group.split(size):
                    tokens, mask = part.tokens[:, :used].to(device), part.mask[:, :used].to(device)
                    scored = self._score(start, tokens, mask)  # (n, used)
                    parts.append(torch.nn.functional.pad(scored, (0, width - used)))
        in_order = torch.cat(parts)[torch.tensor(order, dtype=torch.long).argsort().to(device)]
        refuse_nan(in_order.detach(), samples.texts)
        return in_order if grad else in_order.cpu()

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

    @property
    def _vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def _context(self) -> int:
        """Positions that the model has; practically endless where its configuration names none."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit if limit is not None and limit > 0 else 2**31

    def _check_model(self) -> None:
        """Refuses a model whose cached decoding, token by token, is not what scoring sees."""
        name = getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__
        eos = self.tokenizer.eos_token_id
        if eos >= self._vocab_size:
            raise ValueError(
                f"the tokenizer's EOS has id {eos}, but {name} has {self._vocab_size} tokens, so a "
                "text could not end; resize the model's embeddings or use the tokenizer it was "
                "trained with"
            )
        start = torch.tensor([eos], device=self.device)
        u = uniforms(32, min(8, self._context), seed=0, generator=None).to(self.device)
        with torch.no_grad(), self._computing():
            tokens, drawn = self._decode(start, u)
            is_eos = tokens == eos
            scored = self._score(start, tokens, (is_eos.cumsum(-1) - is_eos.long()) == 0)
        gap = (scored.sum(-1) - drawn).abs().max().item()
        # An unused cache or attention to later tokens costs several nats, rounding in 16 bits some
        # tenths, in float32 less than a thousandth.
        if gap > (0.05 if self.dtype == torch.float32 else 1.0):
            raise ValueError(
                f"{name} gives texts of {u.shape[1]} tokens log-probabilities that differ by "
                f"{gap:.1f} nats between cached decoding and scoring: it is not causal, or keeps "
                "its past elsewhere than in past_key_values; use a decoder-only transformer"
            )

    def _computing(self) -> AbstractContextManager[object]:
        """Autocast where the weights are kept in a higher precision than that of computing."""
        if next(self.model.parameters()).dtype == self.dtype:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def _prompt_ids(self, prompt: str | Sequence[str], new_tokens: int) -> Tensor:
        """The ids before a text, `(L,)` with L >= 1; the one place where prompts become ids."""
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be one string, got {type(prompt).__name__}: {prompt!r}")
        ids = list(self.tokenizer(prompt)["input_ids"])
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        # Some tokenizers close what they read with an EOS; a text goes on where the prompt ends.
        own = list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if ids[-1:] == [eos] and (not own or ids[-len(own) :] != own):
            ids.pop()
        ids = ids or [eos if bos is None else bos]
        # The last token of a text is drawn but never read, so it takes no position.
        room = self._context + 1 - len(ids)
        if new_tokens > room:
            cure = f"use max_new_tokens <= {room}" if room > 0 else "use a shorter prompt"
            raise ValueError(
                f"a prompt of {len(ids)} tokens and {new_tokens} new ones do not fit the model's "
                f"context of {self._context}: {cure}"
            )
        return torch.tensor(ids, device=self.device)

    def _decode(self, start: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `(n, T)`, EOS after the end, and log-probabilities `(n,)`; `u` is `(n, T)`."""
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
        tokens = tokens.masked_fill(~mask, self.tokenizer.eos_token_id)
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


# transformers' own annotations change from version to version.
_DynamicLayer: Any = cache_utils.DynamicLayer


class _RoomyLayer(_DynamicLayer):  # type: ignore[misc]
    """A growing cache layer in a buffer of known length: no copy of the past at each token."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.used = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            n, heads, _, width = key_states.shape
            self.lazy_initialization(key_states, value_states)
            self.key_buffer = key_states.new_empty(n, heads, self.length, width)
            self.value_buffer = value_states.new_empty(
                n, heads, self.length, value_states.shape[-1]
            )
        start, self.used = self.used, self.used + key_states.shape[-2]
        self.key_buffer[:, :, start : self.used] = key_states
        self.value_buffer[:, :, start : self.used] = value_states
        self._show()
        return self.keys, self.values

    def reorder_cache(self, rows: Tensor) -> None:
        if not self.is_initialized:  # a layer that reads another layer's keys never is
            return
        self.key_buffer = self.key_buffer[rows]
        self.value_buffer = self.value_buffer[rows]
        self._show()

    def _show(self) -> None:
        self.keys = self.key_buffer[:, :, : self.used]
        self.values = self.value_buffer[:, :, : self.used]


def _roomy_cache(config: Any, length: int) -> Any:
    """transformers' cache for `config`, with roomy layers where a layer just grows."""
    cache = DynamicCache(config=config)
    cache.layers = [_RoomyLayer(length) if type(x) is _DynamicLayer else x for x in cache.layers]
    return cache


def _rows_by_prompt(prompts: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    yield from rows.items()


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


def _check_settings(tokenizer: Any, max_new_tokens: int, dtype: Any) -> None:
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
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if dtype not in _DTYPES:
        allowed = ", ".join(str(x).removeprefix("torch.") for x in _DTYPES)
        raise ValueError(f"dtype must be one of {allowed}, got {dtype!r}")


def _batch_size(given: int | None, default: int) -> int:
    if given is not None and given < 1:
        raise ValueError(f"batch_size must be at least 1, got {given}")
    return given or max(1, default)
