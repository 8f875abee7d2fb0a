"""The causal language model of both variants: a Hugging Face decoder, a head and, for PRISM, a prototype layer.

Shape suffixes: B blocks, T positions, N = B * T tokens, D hidden size, V vocabulary, K prototypes, k active per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.modeling_outputs import CausalLMOutputWithPast

from prism_lightning.common.errors import UserError
from prism_lightning.common.targets import IGNORED_TARGET
from prism_lightning.models.configuration import PrismConfig
from prism_lightning.models.prototypes import (
    Mixture,
    PrototypeLayer,
    PrototypeTerms,
    route_cross_entropy,
)
from prism_lightning.models.steering import ScaledTerms, Scaling

# Rows of logits in memory at a time, on a CPU. At N 1,024, D 576, V 49,152 the default takes 8: 21 s with the backward
# pass on one core, with 256 rows 6 s; at N 2,048, D 128, V 4,096 .48 and .28 s.
HEAD_ROWS = 256


class LanguageModelHead(nn.Linear):
    """The head W [V, D], which returns logits or, with targets, the mean cross-entropy.

    Both happen in `forward`, where a strategy that shards parameters gathers the weight.
    """

    def forward(self, z: Tensor, targets_N: Tensor | None = None) -> Tensor:
        if targets_N is None:
            return super().forward(z)
        weight_VD = self.weight
        if torch.is_autocast_enabled(z.device.type):
            dtype = torch.get_autocast_dtype(z.device.type)
            z, weight_VD = z.to(dtype), weight_VD.to(dtype)
        options = nn.LinearCrossEntropyOptions()
        if z.device.type == "cpu":
            options = nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=HEAD_ROWS)
        return F.linear_cross_entropy(z, weight_VD, targets_N, options=options)


def unmasked(targets_BT: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return the numbers [n] of the tokens whose targets are not masked, None if none is, and their targets [n].

    Tokens are numbered row by row.
    """
    targets_N = targets_BT.flatten()
    kept_N = targets_N != IGNORED_TARGET
    if kept_N.all():
        return None, targets_N
    kept_n = kept_N.nonzero()[:, 0]
    return kept_n, targets_N[kept_n]


def fuse_activations(backbone: nn.Module) -> None:
    """Replace GPT-2's GELU of eight kernels by one kernel: 14 ms against 107 ms for 8,192 x 512 on a CPU core."""
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


@dataclass
class Objective:
    """The training loss of one batch and its parts; `terms` and `mixture` are None for a dense model.

    N counts the tokens whose targets are not masked. Where all are, N is 0 and the losses are 0.
    """

    loss: Tensor  # L, a scalar
    cross_entropy: Tensor  # CE, a scalar, in nats per token
    hidden_ND: Tensor  # z
    targets_N: Tensor
    terms: PrototypeTerms | None = None
    mixture: Mixture | None = None

    def without_tokens(self) -> Objective:
        """Return the objective of no token: losses of 0 with gradients of 0, and N = 0."""
        mixture = self.mixture and Mixture(*(tensor[:0] for tensor in self.mixture))
        terms = self.terms
        if terms is not None:
            reconstruction, prototype_to_token, token_to_prototype, _ = terms
            terms = PrototypeTerms(0 * reconstruction, 0 * prototype_to_token, 0 * token_to_prototype, None)
        return Objective(0 * self.loss, 0 * self.cross_entropy, self.hidden_ND[:0], self.targets_N[:0], terms, mixture)


class PrismForCausalLM(PreTrainedModel, GenerationMixin):
    """Dense baseline (`num_prototypes=0`) or PRISM model, with `save_pretrained`, `from_pretrained` and `generate`.

    Without interventions both variants compute the logits as W z (method, section 2). Factors on prototypes
    (`intervene`) are part of the configuration, so that an exported model keeps them.

    Args:
        config: decoder, head and prototypes.

    Raises:
        UserError: a backbone that cannot be built.
    """

    config: PrismConfig
    config_class = PrismConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: PrismConfig) -> None:
        super().__init__(config)
        try:
            self.backbone = AutoModel.from_config(config.backbone_config)
        except ValueError as error:  # for example sizes that do not divide each other
            cause = " ".join(str(error).split())
            raise UserError(f"backbone settings refused by {config.get_text_config().model_type}: {cause}") from error
        if config.fuse_activations:
            fuse_activations(self.backbone)
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size, bias=False)
        embedding = self.backbone.get_input_embeddings()
        name = next(name for name, module in self.backbone.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"backbone.{name}.weight"}
        self.prototypes = (
            PrototypeLayer(config.num_prototypes, config.hidden_size, config.active_prototypes, config.encoder)
            if config.num_prototypes
            else None
        )
        self._scaled: ScaledTerms | None = None
        self._scaled_state: tuple[torch.device, int, int] | None = None
        # Fingerprint of the weights before `narrow_decoder` rounded them; None where they were not rounded.
        self.stored_fingerprint: str | None = None
        self.post_init()
        # Parameters of decoder and head that multiply each token: all but prototypes and embeddings that are looked up.
        # Counted here, because a sharding strategy empties the parameters later.
        self.matrix_parameters = self._count_matrix_parameters()
        self.frozen_parameters = 0  # those of them that are not trained, beside adapters

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PrototypeLayer):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, LanguageModelHead):
            nn.init.normal_(module.weight, std=getattr(self.config.backbone_config, "initializer_range", 0.02))
        else:
            super()._init_weights(module)

    def tied_weights(self) -> dict[str, str]:
        """Return the names of parameters that share another parameter's storage, with the other's name."""
        return dict(self._tied_weights_keys) if self.config.tie_word_embeddings else {}

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def _count_matrix_parameters(self) -> int:
        looked_up = sum(m.weight.numel() for m in self.backbone.modules() if isinstance(m, nn.Embedding))
        return sum(p.numel() for p in self.backbone.parameters()) - looked_up + self.lm_head.weight.numel()

    def hidden_states(self, input_ids_BT: Tensor, **kwargs: Any) -> Tensor:
        """Return z [B, T, D], the decoder's final hidden state after its final norm, in the head's number type."""
        z_BTD = self.backbone(input_ids=input_ids_BT, use_cache=False, **kwargs).last_hidden_state
        return z_BTD.to(self.lm_head.weight.dtype)

    def narrow_decoder(self, dtype: torch.dtype, fingerprint: str) -> None:
        """Round the decoder's weights to a narrower number type, for inference.

        Head and prototypes keep their type: only the hidden states become less exact, and everything computed from
        them keeps its precision. A tied head becomes a matrix of its own.

        Args:
            dtype: the decoder's new number type.
            fingerprint: fingerprint of the weights before rounding, which ties indexes and interventions to this model.
        """
        if self.config.tie_word_embeddings:
            self.lm_head.weight = nn.Parameter(self.lm_head.weight.detach().clone())
            self.config.tie_word_embeddings = self.config.get_text_config().tie_word_embeddings = False
        # Not `self.backbone.to(dtype)`, which would also round rotary frequencies: these are not stored and need fp32.
        for tensor in self.backbone.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
        self.stored_fingerprint = fingerprint

    def intervene(self, *scalings: Scaling) -> None:
        """Scale prototypes' terms in the logits (method, section 5), in place of earlier scalings.

        Args:
            scalings: their factors are multiplied; without any, nothing is scaled.

        Raises:
            UserError: as `steering.check`; the model then keeps its earlier scalings.
        """
        self.config.scale(list(scalings))
        self._scaled = None

    @property
    def scalings(self) -> list[Scaling]:
        """The scalings in effect, merged."""
        return self.config.present_scalings()

    def scaled_terms(self) -> ScaledTerms:
        """Return the scaled terms of the present weights and scalings, computed anew when either changes."""
        assert self.prototypes is not None
        weight_KD = self.prototypes.weight
        state = (
            weight_KD.device,
            weight_KD.data_ptr(),
            weight_KD._version,
        )  # changes when weights are moved or written
        if self._scaled is None or self._scaled_state != state:
            self._scaled, self._scaled_state = ScaledTerms(self.prototypes, self.scalings, self.lm_head.weight), state
        return self._scaled

    def logits(self, z: Tensor) -> Tensor:
        """Return logits [..., V] of hidden states z [..., D]: W z, with prototypes' terms scaled by interventions."""
        return self.scaled_terms().logits(z, self.lm_head) if self.config.scalings else self.lm_head(z)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits as any Hugging Face decoder does; `labels` [B, T], shifted here, add the mean cross-entropy."""
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        z_BTD = outputs.last_hidden_state[:, -logits_to_keep:].to(self.lm_head.weight.dtype)
        logits_BTV = self.logits(z_BTD)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def objective(
        self,
        input_ids_BT: Tensor,
        targets_BT: Tensor,
        commitment: float | None = None,
        prototype_gradient_scale: float = 1.0,
        position_ids_BT: Tensor | None = None,
    ) -> Objective:
        """Return the training loss L = CE + w_rec L_rec + w_p2t L_p2t + w_t2p L_t2p (method, section 3).

        Args:
            input_ids_BT: token ids.
            targets_BT: the token that follows each of them; IGNORED_TARGET where it is masked, which takes the token
                out of every term.
            commitment: replaces the configuration's commitment; 0 before the prototypes are placed.
            prototype_gradient_scale: factor on the prototypes' gradient, to which Adam is invariant.
            position_ids_BT: positions that restart at every document, where documents are isolated.
        """
        kept_n, targets_N = unmasked(targets_BT)
        positions = {} if position_ids_BT is None else {"position_ids": position_ids_BT}
        z_ND = self.hidden_states(input_ids_BT, **positions).flatten(0, 1)
        if kept_n is None:
            return self._objective(z_ND, targets_N, commitment, prototype_gradient_scale)
        if len(kept_n):
            return self._objective(z_ND[kept_n], targets_N, commitment, prototype_gradient_scale)
        # Every parameter still takes part, since ranks that train together wait for each other's gradients.
        result = self._objective(z_ND[:1], targets_BT.new_zeros(1), commitment, prototype_gradient_scale)
        return result.without_tokens()

    def _objective(
        self, z_ND: Tensor, targets_N: Tensor, commitment: float | None, prototype_gradient_scale: float
    ) -> Objective:
        """Return the objective of hidden states and their targets; see `objective`."""
        config = self.config
        if self.prototypes is None:
            cross_entropy = self.lm_head(z_ND, targets_N)
            return Objective(cross_entropy, cross_entropy, z_ND, targets_N)
        commitment = config.commitment if commitment is None else commitment
        mixture, terms = self.prototypes(
            z_ND,
            commitment,
            config.cross_entropy_to_prototypes,
            gradient_scale=prototype_gradient_scale,
            head_VD=self.lm_head.weight,
        )
        routed_ND = z_ND
        if terms.value_mixture_ND is not None:
            routed_ND = route_cross_entropy(z_ND, terms.value_mixture_ND)
        cross_entropy = self.lm_head(routed_ND, targets_N)
        loss = (
            cross_entropy
            + config.reconstruction_weight * terms.reconstruction
            + config.prototype_to_token_weight * terms.prototype_to_token
            + config.token_to_prototype_weight * terms.token_to_prototype
        )
        return Objective(loss, cross_entropy, z_ND, targets_N, terms, mixture)
