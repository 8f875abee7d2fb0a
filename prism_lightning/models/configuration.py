"""The Hugging Face configuration of a dense model (no prototypes) or a PRISM model."""

from __future__ import annotations

from typing import Any, get_args

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from prism_lightning.common.errors import UserError, nearest
from prism_lightning.models.encoders import EncoderName
from prism_lightning.models.steering import Scaling, check, merged


class PrismConfig(PreTrainedConfig):
    """A decoder backbone, its head, and `num_prototypes` prototypes (0: the dense baseline).

    The weights of the training objective (method, section 3) are part of the configuration, because attribution uses
    the gradient of the same objective as the record of a training token.

    Args:
        backbone_config: any Hugging Face decoder configuration, e.g. `{"model_type": "gpt2", "n_layer": 4}`.
        num_prototypes: K, the number of rows of P; 0 builds the dense baseline.
        active_prototypes: k, the largest number of prototypes that are active for one token.
        encoder: "cosine" takes those of largest cosine, "pursuit" those that predict alike, see `models.encoders`.
        reconstruction_weight: w_rec, the weight of L_rec, the fraction of variance left unexplained.
        prototype_to_token_weight: w_p2t, the weight of L_p2t, which keeps every prototype near some token.
        token_to_prototype_weight: w_t2p, the weight of L_t2p, which keeps every token near some prototype.
        commitment: factor from 0 to 1 on the gradient that these three losses send to the backbone.
        cross_entropy_to_prototypes: whether the cross-entropy trains the prototypes (each receives a_ti delta_t).
        scalings: factors on prototypes' terms in the logits, as interventions set them (method, section 5).
        base_model: hub id or folder name of the pretrained model that the decoder comes from; None without one.
        fuse_activations: whether GPT-2's activation runs as one kernel, which changes its logits by 1e-6. A retrofitted
            model keeps the kernels of its base model, so that its logits are equal bit for bit.

    Raises:
        UserError: a value out of range, or a backbone as `backbone_configuration` refuses it.
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
    encoder: EncoderName = "cosine"
    base_model: str | None = None
    fuse_activations: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.backbone_config, PreTrainedConfig):
            settings = dict(self.backbone_config or {"model_type": "gpt2"})
            if self.base_model is None:
                self.backbone_config = backbone_configuration(settings)
            else:  # pretrained models keep settings of their own beside those of their type
                self.backbone_config = CONFIG_MAPPING[settings.pop("model_type")](**settings)
        # The outer flag decides on tying: without it, from_pretrained re-initialises a tied head.
        self.tie_word_embeddings = self.backbone_config.tie_word_embeddings
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.backbone_config, name, None))
        super().__post_init__(**kwargs)
        self._check()
        self.scale(self.present_scalings())

    def _check(self) -> None:
        if self.num_prototypes < 0:
            raise UserError(f"num_prototypes is {self.num_prototypes}: give 0 (dense) or a positive number")
        if self.num_prototypes and not 1 <= self.active_prototypes <= self.num_prototypes:
            raise UserError(
                f"active_prototypes is {self.active_prototypes} but must lie between 1 and"
                f" num_prototypes={self.num_prototypes}: lower k or raise K"
            )
        if self.encoder not in get_args(EncoderName):
            raise UserError(f"encoder is {self.encoder!r}: give {' or '.join(get_args(EncoderName))}")
        if not 0 <= self.commitment <= 1:
            raise UserError(f"commitment is {self.commitment}: give a number from 0 (free backbone) to 1 (symmetric)")

    def scale(self, scalings: list[Scaling]) -> None:
        """Set `scalings`, merged; an error as of `steering.check` leaves the present ones unchanged."""
        check(scalings, self.num_prototypes, self.vocab_size)
        self.scalings = [
            {"factors": {str(prototype): factor for prototype, factor in s.factors.items()}, "tokens": s.tokens}
            for s in merged(scalings)
        ] or None

    def present_scalings(self) -> list[Scaling]:
        """Return `scalings` in the form that `scale` takes."""
        return [
            Scaling(
                {int(i): float(f) for i, f in s["factors"].items()}, None if s["tokens"] is None else tuple(s["tokens"])
            )
            for s in self.scalings or []
        ]

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the backbone's configuration, from which `generate` takes the size of its key-value cache."""
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
    """Return a Hugging Face decoder configuration from plain settings, `model_type` among them.

    Hugging Face keeps unknown names as attributes: a misspelt `n_layers: 24` would train 12 layers without an error.

    Raises:
        UserError: an unknown `model_type` or setting, a value that the configuration refuses, or no decoder.
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
    except Exception as error:  # huggingface_hub has an exception type for each kind of problem
        raise UserError(f"backbone settings refused by {model_type}: {' '.join(str(error).split())}") from error
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise UserError(
            f"backbone.model_type {model_type} attends to the tokens that it predicts: take gpt2, llama or another"
            " decoder"
        )
    missing = [name for name in ("hidden_size", "vocab_size", "max_position_embeddings") if not hasattr(config, name)]
    if missing:
        raise UserError(
            f"backbone.model_type {model_type} has no {missing[0]}: take another decoder, for example gpt2 or llama"
        )
    return config
