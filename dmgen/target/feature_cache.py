"""`FeatureCache`: feature values of texts, computed once for each text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from dmgen.constraints.feature import Feature


class FeatureCache:
    """The values of features on texts; of the oldest texts they are forgotten.

    Args:
        features: F features with different names.
        size: most texts whose values are kept; about 100 bytes each beside the text itself.

    Attributes:
        binary: by feature name, whether the feature is binary, as far as its values show.
    """

    def __init__(self, features: Sequence[Feature], size: int = 100_000) -> None:
        self.features = list(features)
        self.size = size
        self.binary = {feature.name: True for feature in self.features}
        self._rows: dict[tuple[str, str], tuple[float, ...]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def values(self, prompts: Sequence[str], texts: Sequence[str]) -> dict[str, Tensor]:
        """Return feature values, float64 `(N,)`, by feature name.

        Args:
            prompts: the prompt of each text.
            texts: N texts.

        Raises:
            FeatureError: a feature raises or returns something other than a finite number.
        """
        keys = list(zip(prompts, texts, strict=True))
        new = list(dict.fromkeys(key for key in keys if key not in self._rows))
        if new:
            self._rows.update(zip(new, self._evaluated(new), strict=True))
        table = torch.tensor([self._rows[key] for key in keys], dtype=torch.float64)
        table = table.reshape(len(keys), len(self.features))  # (N, F), for no texts too
        for key in list(islice(self._rows, max(0, len(self._rows) - self.size))):
            del self._rows[key]
        return {feature.name: table[:, j] for j, feature in enumerate(self.features)}

    def _evaluated(self, keys: Sequence[tuple[str, str]]) -> list[tuple[float, ...]]:
        prompts, texts = [prompt for prompt, _ in keys], [text for _, text in keys]
        columns = []
        for feature in self.features:
            column, binary = feature.evaluate(texts, prompts)
            self.binary[feature.name] &= binary
            columns.append(column.tolist())
        return list(zip(*columns, strict=True))
