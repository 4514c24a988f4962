"""Trains the dictionaries that a `kvcore.cache.LexicoCache` codes K and V with.

`train` captures keys and values of a model's own forward passes and fits a dictionary to each
layer's; ``kvcore train-dictionary`` is its command. transformers is needed.
"""

from kvcore.lexico_training.rows import text_rows
from kvcore.lexico_training.session import Interrupted, render, train
from kvcore.lexico_training.trainer import DictionaryTrainer, Recipe

__all__ = ["DictionaryTrainer", "Interrupted", "Recipe", "render", "text_rows", "train"]
