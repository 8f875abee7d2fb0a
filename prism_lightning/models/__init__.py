"""Models in torch: the prototype layer, the decoder with its head, and the exact decomposition of a logit."""

from transformers import AutoConfig, AutoModelForCausalLM

from prism_lightning.models.configuration import PrismConfig
from prism_lightning.models.decomposition import Decomposition, decompose
from prism_lightning.models.language_model import Objective, PrismForCausalLM
from prism_lightning.models.prototypes import Mixture, PrototypeLayer

__all__ = ["Decomposition", "Mixture", "Objective", "PrismConfig", "PrismForCausalLM", "PrototypeLayer", "decompose"]

# Here, and not beside the class: its module is also loaded from model folders, several in one process (see `portable`).
AutoConfig.register("prism", PrismConfig)
AutoModelForCausalLM.register(PrismConfig, PrismForCausalLM)
