"""Small models for the tests: enumerable ones, and random transformers over a few letters."""

from __future__ import annotations

from typing import Any

import contracts
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dmgen.models import CausalLM, TabularLM
from dmgen.training.batch import Batch


def as_table(world: TabularLM, log_prob: torch.Tensor) -> TabularLM:
    """The model that gives every text of `world`, in their order, this log-probability."""
    every = world.enumerate()
    # Each token of each text adds the text's probability to the row of its prefix.
    cells = (world._prefix_rows(every.tokens)[every.mask], every.tokens[every.mask])
    p = log_prob.exp()[:, None].expand(every.mask.shape)[every.mask]
    mass = torch.zeros_like(world.logits).index_put_(cells, p, accumulate=True)
    logits = torch.where(mass.sum(-1, keepdim=True) > 0, mass.log(), 0.0)
    return TabularLM(world.vocab, logits, world.max_new_tokens, eos=world.eos)


def tiny_gpt2(dtype: torch.dtype | None = None) -> CausalLM:
    tokenizer = letters("<end>", bos="<end>", eos="<end>", pad="<end>")
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=8,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.5,  # must have no influence
        attn_pdrop=0.5,
        embd_pdrop=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = randomised(GPT2LMHeadModel(config), scale=0.3, seed=0)
    return CausalLM(model, tokenizer, max_new_tokens=4, dtype=dtype)


def tiny_llama(dtype: torch.dtype | None = None) -> CausalLM:
    tokenizer = letters("<s>", "</s>", bos="<s>", eos="</s>", add_bos=True)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = randomised(LlamaForCausalLM(config), scale=0.3, seed=3)
    return CausalLM(model, tokenizer, max_new_tokens=3, dtype=dtype)


def letters(
    *special: str,
    bos: str | None = None,
    eos: str | None = None,
    pad: str | None = None,
    add_bos: bool = False,
    add_eos: bool = False,
) -> PreTrainedTokenizerFast:
    """A tokenizer of the given special tokens, in that order, and the letters a, b and c."""
    vocab = {token: i for i, token in enumerate([*special, "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    if add_bos or add_eos:
        template = [bos] * add_bos + ["$A"] + [eos] * add_eos
        added = {token for token in (bos, eos) if token in template}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(template), special_tokens=[(token, vocab[token]) for token in added]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad
    )


def randomised(model: Any, *, scale: float, seed: int) -> Any:
    """The model with normal weights, large enough that its probabilities are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def tied_llama(v):
    return LlamaForCausalLM(LlamaConfig(vocab_size=v, **SIZES, tie_word_embeddings=True))


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation gave."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.n = max(self.n, tensor.numel())
        return out


def space_of(lm, prompt=""):
    eos = lm.tokenizer.eos_token_id
    space = contracts.every_text(len(lm.tokenizer), lm.max_new_tokens, eos=eos, prompt=prompt)
    if lm.model._forward_hooks:  # the endless one
        return space[(space.tokens != eos).all(-1)]
    return space


def batch_of(trainer, samples, log_z=0.0, log_policy=None):
    """The batch of a trainer's step for these texts, as its objective prepares it."""
    target = trainer.target
    batch = Batch(
        samples.log_prob,
        samples,
        dict(target.values(samples)),
        log_score=target.log_score(samples),
        log_policy=log_policy,
        log_z=torch.full((len(samples),), log_z, dtype=torch.float64),
    )
    columns = trainer.setup.objective.draw_columns(trainer.state, batch, target)
    return trainer.setup.objective.prepare(trainer.state, batch.with_(tokens=columns), target)
