"""Base class of objectives that train all parameters of a model, drawn from a seed."""

from __future__ import annotations

from typing import Any


class WholeModel:
    """Parameters of an objective that starts from a seed.

    Attributes:
      model: the model.
      frozen: parameters that are not trained; None for this class.
    """

    model: Any
    frozen: Any = None

    @property
    def trained(self) -> Any:
        """Return the model, whose parameters are all trained."""
        return self.model

    def load(self, device_mesh: Any) -> Any:
        """Return None: the parameters are drawn from the seed."""
        del device_mesh

    def merge(self, params: Any, frozen: Any) -> Any:
        """Return the parameters of the model: the trained ones."""
        del frozen
        return params
