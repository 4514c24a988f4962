"""What the tests of training share: a recipe and rows so small that a run takes seconds."""

import torch

import hf_models
from kvcore.lexico_training.trainer import Recipe

SMALL = Recipe(atoms=96, sparsity=4, steps=40, batch=128, renew_every=10)


def make_rows(count=6, length=160):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, hf_models.VOCAB, (length,), generator=generator) for _ in range(count)]
