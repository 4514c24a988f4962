"""Gradient descent on one dictionary (arXiv 2412.08890, section 3.1).

Vectors are encoded by `kvcore.lexico_encode` without a gradient; with the codes held fixed the
squared error has a gradient in the dictionary alone. Of it only what is orthogonal to an atom can
change that atom, whose norm is 1; after each step of Adam the atoms get that norm back.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from kvcore import ops


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hyperparameters of one dictionary."""

    atoms: int = 1024
    sparsity: int = 16
    steps: int = 4000
    batch: int = 1024  # vectors of a step
    rate: float = 1e-2  # of Adam at the first step; falls to 0 along half a cosine
    beta1: float = 0.9
    beta2: float = 0.99
    # Every so many steps, atoms used less than `idle_share` of the mean use begin anew at vectors
    # that the others serve worst, until `settle` of the steps are done.
    renew_every: int = 100
    idle_share: float = 0.02
    settle: float = 0.8
    seed: int = 0


def generator(*numbers: int) -> torch.Generator:
    """A random generator that depends on the numbers alone."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (1 << 63)
    return torch.Generator().manual_seed(seed)


class DictionaryTrainer:
    """A dictionary in training. Everything that changes is in :meth:`state`.

    Which vectors a step sees is a function of its number, so a run that goes on from a saved state
    is the uninterrupted run, bit for bit.

    Args:
        vectors: ``[num_vectors, head_dim]``, as many as there are atoms and as a step takes, or
            more; finite and not all zero.
        recipe: hyperparameters.
    """

    def __init__(self, vectors: Tensor, recipe: Recipe) -> None:
        # Adam's epsilon should mean the same for keys and for values a hundred times smaller.
        self.size = vectors.double().square().mean().sqrt().item()
        self.vectors = vectors
        self.recipe = recipe
        self.step_idx = 0
        self.dictionary = self._initial()
        self._momentum = torch.zeros_like(self.dictionary)
        self._variance = torch.zeros_like(self.dictionary)
        self._uses = torch.zeros(recipe.atoms, dtype=torch.int64)
        self._errors = torch.zeros(recipe.steps)
        self._epoch, self._order = 0, self._permutation(0)

    @property
    def done(self) -> bool:
        return self.step_idx >= self.recipe.steps

    def state(self) -> dict[str, Tensor]:
        """Tensors that a run goes on from; see :meth:`load_state`."""
        return {
            "step": torch.tensor(self.step_idx),
            "dictionary": self.dictionary,
            "momentum": self._momentum,
            "variance": self._variance,
            "uses": self._uses,
            "errors": self._errors,
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Goes on from a state of a trainer with the same vectors and recipe."""
        self.step_idx = int(state["step"])
        self.dictionary = state["dictionary"].clone()
        self._momentum = state["momentum"].clone()
        self._variance = state["variance"].clone()
        self._uses = state["uses"].clone()
        self._errors = state["errors"].clone()

    def curve(self, points: int = 20) -> list[float]:
        """Mean squared error, over squared norms, of so many equal parts of the steps done."""
        done = self._errors[: self.step_idx]
        return [part.mean().item() for part in done.tensor_split(min(points, len(done) or 1))]

    def step(self) -> float:
        """One step of Adam; returns the step's squared error over the squared norms."""
        recipe = self.recipe
        x = self.vectors[self._batch()].float() / self.size
        indices, values, scale, _ = ops.lexico_encode(
            x[None, None], self.dictionary, sparsity=recipe.sparsity, dtype=torch.float32
        )
        rebuilt = ops.lexico_reconstruct(indices, values, scale, self.dictionary)
        residual = x - rebuilt[0, 0]
        error = residual.square().sum() / x.square().sum()
        self._descend(indices[0, 0].long(), values[0, 0], residual)
        self._errors[self.step_idx] = error
        self.step_idx += 1
        if self.step_idx % recipe.renew_every == 0:
            if self.step_idx <= recipe.settle * recipe.steps:
                self._renew(residual)
            self._uses.zero_()
        return error.item()

    def _initial(self) -> Tensor:
        """Atoms in the directions of vectors, all of them different."""
        random = generator(self.recipe.seed, 0)
        chosen = torch.randperm(len(self.vectors), generator=random)[: self.recipe.atoms]
        atoms = self.vectors[chosen].float() / self.size
        noise = torch.randn(self.recipe.atoms, atoms.shape[1], generator=random)
        # Enough to tell equal vectors, and zeros, apart.
        return _unit(atoms + 0.01 * noise)

    def _batch(self) -> Tensor:
        """Rows of this step: every epoch is a permutation of its own."""
        per_epoch = len(self.vectors) // self.recipe.batch
        epoch, part = divmod(self.step_idx, per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(epoch)
        return self._order[part * self.recipe.batch : (part + 1) * self.recipe.batch]

    def _permutation(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.vectors), generator=generator(self.recipe.seed, 1, epoch))

    def _descend(self, indices: Tensor, values: Tensor, residual: Tensor) -> None:
        recipe, dictionary = self.recipe, self.dictionary
        gradient = dictionary_gradient(indices, values, residual, dictionary)
        self._uses += torch.bincount(indices[values != 0], minlength=recipe.atoms)
        count = self.step_idx + 1
        self._momentum.lerp_(gradient, 1 - recipe.beta1)
        self._variance.lerp_(gradient.square(), 1 - recipe.beta2)
        mean = self._momentum / (1 - recipe.beta1**count)
        deviation = (self._variance / (1 - recipe.beta2**count)).sqrt()
        rate = recipe.rate * (1 + math.cos(math.pi * self.step_idx / recipe.steps)) / 2
        self.dictionary = _unit(dictionary - rate * mean / (deviation + 1e-8))

    def _renew(self, residual: Tensor) -> None:
        """Idle atoms take the directions of this step's largest residuals."""
        fair = self.recipe.idle_share * self._uses.double().mean()
        idle = (self._uses < fair).nonzero()[:, 0][: len(residual)]
        worst = residual.square().sum(1).topk(len(idle)).indices
        # A vector that is coded exactly has no direction to offer.
        worst = worst[residual[worst].square().sum(1) > 1e-12]
        idle = idle[: len(worst)]
        self.dictionary[idle] = _unit(residual[worst])
        self._momentum[idle] = 0
        self._variance[idle] = 0


def dictionary_gradient(
    indices: Tensor, values: Tensor, residual: Tensor, dictionary: Tensor
) -> Tensor:
    """Gradient of the mean squared error in the atoms, codes fixed, orthogonal to each atom.

    Args:
        indices: int64 ``[num_vectors, sparsity]``.
        values: fp32 ``[num_vectors, sparsity]``.
        residual: fp32 ``[num_vectors, head_dim]``, vectors minus what their codes stand for.
        dictionary: fp32 ``[atoms, head_dim]``, rows of norm 1.

    Returns:
        fp32 ``[atoms, head_dim]``.
    """
    parts = values[:, :, None] * residual[:, None, :]
    gradient = torch.zeros_like(dictionary)
    gradient.index_add_(0, indices.flatten(), parts.flatten(0, 1), alpha=-2 / len(residual))
    return gradient - (gradient * dictionary).sum(1, keepdim=True) * dictionary


def _unit(atoms: Tensor) -> Tensor:
    return atoms / atoms.norm(dim=1, keepdim=True)
