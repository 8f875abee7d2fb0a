"""Models in torch: the prototype layer, the decoder with its head, and the exact decomposition of a logit."""

from prism_lightning.models.configuration import PrismConfig
from prism_lightning.models.decomposition import Decomposition, decompose
from prism_lightning.models.language_model import Objective, PrismForCausalLM
from prism_lightning.models.prototypes import Mixture, PrototypeLayer

__all__ = ["Decomposition", "Mixture", "Objective", "PrismConfig", "PrismForCausalLM", "PrototypeLayer", "decompose"]
