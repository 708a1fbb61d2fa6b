"""`Batch`: columns and texts that are cut together, and what it does not know."""

import dataclasses

import pytest
import torch

from dmgen.training.batch import Batch


@pytest.fixture
def batch(world):
    samples = world.sample(6, seed=0)
    return Batch(
        samples.log_prob,
        samples,
        {"length": samples.n_tokens.double()},
        log_score=samples.log_prob + 1,
        log_z=torch.arange(6.0, dtype=torch.float64),
        tokens={"mask": samples.mask.double()},
    )


def test_rows_are_cut_together(batch):
    part = batch[[4, 1]]
    assert len(part) == 2
    assert part.texts.texts == [batch.texts.texts[4], batch.texts.texts[1]]
    assert part.log_z.tolist() == [4.0, 1.0]
    assert part.features["length"].tolist() == part.texts.n_tokens.tolist()
    assert torch.equal(part.tokens["mask"], part.texts.mask.double())
    assert torch.equal(part.log_w, torch.ones(2, dtype=torch.float64))
    assert part.log_policy is None


def test_texts_of_one_of_several_processes(batch):
    """Columns are of all texts, samples of rows 2 to 4."""
    own = dataclasses.replace(batch, samples=batch.texts[2:5], first=2)
    assert own.own == slice(2, 5)
    assert len(own) == 6
    part = own[torch.tensor([4, 2])]
    assert part.texts.texts == [batch.texts.texts[4], batch.texts.texts[2]]
    assert part.log_z.tolist() == [4.0, 2.0]


def test_an_unknown_column_is_named(batch):
    with pytest.raises(ValueError, match="does not know log_policy"):
        batch.column("log_policy")
    with pytest.raises(ValueError, match="no texts"):
        _ = Batch(batch.log_q).texts
