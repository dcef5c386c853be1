"""The class-conditional TiM network."""

from typing import Any

import torch
from torch import Tensor, nn

from tim.models.attention import SelfAttention as Attention
from tim.models.blocks import FinalLayer
from tim.models.dual import Value, add
from tim.models.embeddings import LabelEmbedder, TimestepEmbedder
from tim.models.trunk import TransitionTransformer
from tim.typed_yaml import Fraction, PositiveInt

__all__ = ["Attention", "FinalLayer", "LabelEmbedder", "TiM", "TimestepEmbedder"]  # what experiments import from here


class TiM(TransitionTransformer):
    """Class-conditional network: c = T(t) + d + label embedding.

    Takes the arguments of `TransitionTransformer` and

    Args:
        class_dropout_prob: probability with which the *trainer* drops labels; above 0 the label table has a
            null row, index num_classes.
        num_classes: number of classes.
    """

    def __init__(self, *args: Any, class_dropout_prob: Fraction = 0.1, num_classes: PositiveInt = 1000, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_classes, self.class_dropout_prob = num_classes, class_dropout_prob
        self.y_embedder = LabelEmbedder(num_classes, self.hidden_size, class_dropout_prob)
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As the trunk's, and a small normal label table."""
        super().initialize_weights()
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)

    def condition(self, c: Value, y: Tensor) -> tuple[Value, None]:
        """c with the embedding of labels y (B,), num_classes for the null class; nothing for cross-attention."""
        return add(c, self.y_embedder(y)), None
