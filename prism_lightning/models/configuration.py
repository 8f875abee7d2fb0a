"""The Hugging Face configuration of a dense model (no prototypes) or a PRISM model."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from prism_lightning.common.errors import UserError, nearest
from prism_lightning.models.steering import Scaling, check, merged


class PrismConfig(PreTrainedConfig):
    """A decoder backbone, its head, and `num_prototypes` prototypes (0: the dense baseline).

    The weights of the training objective live here because attribution will need them: the record of a training
    token is the gradient of what was trained.

    Args:
        backbone_config: any Hugging Face decoder configuration, e.g. `{"model_type": "gpt2", "n_layer": 4}`.
        num_prototypes: K, rows of P. 0 builds the dense baseline.
        active_prototypes: k, the prototypes with the largest cosine that may be active for one token.
        reconstruction_weight: w_rec of L_rec, the fraction of variance left unexplained.
        prototype_to_token_weight: w_p2t of L_p2t, which keeps every prototype near some token.
        token_to_prototype_weight: w_t2p of L_t2p, which keeps every token near some prototype.
        commitment: how strongly these three losses bend the backbone: 1 symmetric, 0 not at all.
        cross_entropy_to_prototypes: let the cross-entropy reach the prototypes (each receives a_ti * delta_t).
        scalings: factors on prototypes' terms in the logits, of all tokens or some: what interventions set.
    """

    model_type = "prism"
    sub_configs = {"backbone_config": AutoConfig}

    backbone_config: dict | PreTrainedConfig | None = None
    num_prototypes: int = 0
    active_prototypes: int = 4
    reconstruction_weight: float = 1.0
    prototype_to_token_weight: float = 0.1
    token_to_prototype_weight: float = 0.1
    commitment: float = 0.1
    cross_entropy_to_prototypes: bool = False
    scalings: list[dict[str, Any]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.backbone_config, PreTrainedConfig):
            self.backbone_config = backbone_configuration(self.backbone_config or {"model_type": "gpt2"})
        # The outer flag decides on tying, and from_pretrained re-initialises a tied head when it is missing there.
        self.tie_word_embeddings = self.backbone_config.tie_word_embeddings
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.backbone_config, name, None))
        super().__post_init__(**kwargs)
        self._check()
        self.scale(self.scalings_given())

    def _check(self) -> None:
        if self.num_prototypes < 0:
            raise UserError(f"num_prototypes is {self.num_prototypes}: give 0 (dense) or a positive number")
        if self.num_prototypes and not 1 <= self.active_prototypes <= self.num_prototypes:
            raise UserError(
                f"active_prototypes is {self.active_prototypes} but must lie between 1 and"
                f" num_prototypes={self.num_prototypes}: lower k or raise K"
            )
        if not 0 <= self.commitment <= 1:
            raise UserError(f"commitment is {self.commitment}: give a number from 0 (free backbone) to 1 (symmetric)")

    def scale(self, scalings: list[Scaling]) -> None:
        """Set `scalings`, merged; raises as `steering.check`, and then leaves them as they are."""
        check(scalings, self.num_prototypes, self.vocab_size)
        self.scalings = [
            {"factors": {str(prototype): factor for prototype, factor in s.factors.items()}, "tokens": s.tokens}
            for s in merged(scalings)
        ] or None

    def scalings_given(self) -> list[Scaling]:
        """`scalings` as `scale` takes them."""
        return [
            Scaling(
                {int(i): float(f) for i, f in s["factors"].items()}, None if s["tokens"] is None else tuple(s["tokens"])
            )
            for s in self.scalings or []
        ]

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The backbone's configuration: what `generate` sizes its key-value cache by."""
        assert isinstance(self.backbone_config, PreTrainedConfig)
        return self.backbone_config

    @property
    def vocab_size(self) -> int:
        return self.get_text_config().vocab_size

    @property
    def hidden_size(self) -> int:
        return self.get_text_config().hidden_size

    @property
    def context_length(self) -> int:
        return self.get_text_config().max_position_embeddings


def backbone_configuration(settings: dict[str, Any]) -> PreTrainedConfig:
    """Build a Hugging Face configuration from plain settings, refusing names that it does not have.

    Hugging Face keeps unknown names silently as attributes, so that a misspelt `n_layers: 24` would train 12 layers.

    Raises:
        UserError: unknown `model_type`, unknown setting, or a value the configuration refuses.
    """
    settings = dict(settings)
    model_type = settings.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise UserError(f"backbone.model_type is {model_type!r}: {nearest(str(model_type), CONFIG_MAPPING.keys())}")
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    known = set(default.to_dict()) | set(default.attribute_map) | {"attn_implementation", "dtype"}
    problems = [
        f"backbone.{name} is no setting of {model_type}: {nearest(name, known)}"
        for name in settings
        if name not in known
    ]
    if problems:
        raise UserError(problems)
    # Defaults such as GPT-2's 50256 lie outside a smaller vocabulary; the tokenizer's own ids are set at export.
    settings = {"bos_token_id": None, "eos_token_id": None} | settings
    try:
        config = config_class(**settings)
    except Exception as error:  # huggingface_hub raises its own dataclass errors, one type per kind of problem
        raise UserError(f"backbone settings refused by {model_type}: {' '.join(str(error).split())}") from error
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise UserError(
            f"backbone.model_type {model_type} sees what it is to predict: take a decoder, gpt2 or llama say"
        )
    missing = [name for name in ("hidden_size", "vocab_size", "max_position_embeddings") if not hasattr(config, name)]
    if missing:
        raise UserError(
            f"backbone.model_type {model_type} has no {missing[0]}: take another decoder, gpt2 or llama say"
        )
    return config
