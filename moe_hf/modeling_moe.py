"""The `moe_hf` decoder: attention, dense MLPs, mixtures of experts, and the causal language model on top.

Shape letters: B batch, S sequence, T = B * S tokens, H hidden size, E experts, K experts per token, I expert width.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation, use_kernel_forward_from_hub, use_kernelized_func
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_moe import MoEConfig
from .kept_choices import keep_choices
from .language_head import LanguageHead, loss_in_chunks, loss_of_logits
from .linear_cross_entropy import IGNORED_LABEL
from .modeling_outputs import MoECausalLMOutput, MoEModelOutput
from .router_losses import StatisticsReducer, count_layers, router_losses, router_statistics
from .routing import ExpertChoiceRouter, MoERouter, RouterTap


@use_experts_implementation
class MoEExperts(nn.Module):
    """All experts of one layer as two 3-D weights: `gate_up_proj` `(E, 2I, H)`, gate first, `down_proj` `(E, H, I)`.

    The forward below is the `"eager"` implementation; the decorator dispatches to the one that
    `config._experts_implementation` names.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of each token's experts, `(T, H)`; arguments `(T, H)`, `(T, K)` and `(T, K)`."""
        output = torch.zeros_like(hidden_states)
        # unbind, not indexing: its backward fills one (E, ...) gradient instead of one for every expert.
        weights = zip(self.gate_up_proj.unbind(0), self.down_proj.unbind(0), strict=True)
        for expert, (gate_up_proj, down_proj) in enumerate(weights):
            token, slot = torch.where(top_k_index == expert)
            if token.numel() == 0:
                continue
            gate, up = F.linear(hidden_states[token], gate_up_proj).chunk(2, dim=-1)
            expert_output = F.linear(self.act_fn(gate) * up, down_proj)
            weighted = expert_output * top_k_weights[token, slot, None]
            output.index_add_(0, token, weighted.to(output.dtype))
        return output


class MoEMLP(nn.Module):
    """SwiGLU MLP of a dense layer or of a shared expert (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: MoEConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class MoESparseBlock(nn.Module):
    """Router, routed experts and, if configured, an expert that every token visits.

    DeepSpeed's AutoEP replaces this block as a whole; the names `gate`, `experts`, `shared_experts` and
    `shared_experts_gate` are what it looks for.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.expert_choice = config.router_balancing == "expert_choice"
        self.gate = ExpertChoiceRouter(config) if self.expert_choice else MoERouter(config)
        self.experts = MoEExperts(config)
        width = config.shared_expert_intermediate_size
        self.shared_experts = MoEMLP(config, width) if width else None
        self.shared_experts_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        output = self._run_chosen_tokens(tokens) if self.expert_choice else self._run_chosen_experts(tokens)
        if self.shared_experts is not None:
            shared = self.shared_experts(tokens)
            if self.shared_experts_gate is not None:
                shared = self.shared_experts_gate(tokens).sigmoid() * shared
            output = output + shared
        return output.view_as(hidden_states)

    def _run_chosen_experts(self, tokens: torch.Tensor) -> torch.Tensor:
        top_k_weights, top_k_index, _ = self.gate(tokens)
        return self.experts(tokens, top_k_index, top_k_weights)

    def _run_chosen_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        weights, token_index = self.gate(tokens)
        # Every row is a token of one expert, so that any implementation of the experts can compute them.
        experts = torch.arange(len(token_index), device=tokens.device)[:, None].expand_as(token_index)
        chosen = token_index.reshape(-1)
        rows = self.experts(tokens[chosen], experts.reshape(-1, 1), weights.reshape(-1, 1))
        return torch.zeros_like(tokens).index_add_(0, chosen, rows.to(tokens.dtype))


@use_kernel_forward_from_hub("RMSNorm")
class MoERMSNorm(nn.Module):
    """Root-mean-square normalisation in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class MoERotaryEmbedding(nn.Module):
    """Cosines and sines of rotary position embeddings (Su et al. 2021, arXiv 2104.09864), with every HF scaling.

    `PreTrainedModel` re-initialises modules of this shape by their attribute names, so those follow its convention.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        self.compute_frequencies()

    def compute_frequencies(self) -> None:
        """Compute `inv_freq` `(rotary_dim / 2,)` in float32, anew where it was rounded when it was made."""
        rope_init_fn = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        device = self.inv_freq.device if "inv_freq" in self._buffers else None
        inv_freq, self.attention_scaling = rope_init_fn(self.config, device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: MoEConfig, device: torch.device | None = None, *args, **kwargs
    ) -> tuple[torch.Tensor, float]:
        """Return `theta ** (-2i / rotary_dim)` for each rotated pair i, and the factor 1 on cosines and sines."""
        rotary_dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float, device=device) / rotary_dim
        return config.rope_parameters["rope_theta"] ** -exponent, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines `(B, S, rotary_dim)` in the dtype of `x`; the angles are float32."""
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((freqs, freqs), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x_i, x_{i + d/2}) by 90 degrees."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


@use_kernel_forward_from_hub("rotary_pos_emb")
def apply_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate all channels of queries and keys `(B, heads, S, rotary_dim)` by angles `(B, S, rotary_dim)`."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend in plain PyTorch: the only implementation that returns its weights."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class SharedSequence(Protocol):
    """What a model is handed where every rank of a group holds a piece of the same sequences; `parallel/` has it."""

    def attend(self, attend: Callable, module: nn.Module, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Let a piece's queries attend over the whole sequences by the implementation `attend`; arguments as for it."""

    def sum(self, statistics: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor without gradients over the ranks of the group."""


class AttentionTap(nn.Module):
    """Identity through which queries `(B, heads, S, D)` and keys `(B, key heads, S, D)` pass, for forward hooks."""

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return query, key


@use_kernelized_func(apply_rotary_pos_emb)
class MoEAttention(nn.Module):
    """Grouped-query attention with rotary positions, optional QK-norm and optional sigmoid output gate."""

    def __init__(self, config: MoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        q_size, kv_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.attention_output_bias)
        if config.use_qk_norm:
            per_head = config.qk_norm_scope == "head"
            self.q_norm = MoERMSNorm(self.head_dim if per_head else q_size, config.rms_norm_eps)
            self.k_norm = MoERMSNorm(self.head_dim if per_head else kv_size, config.rms_norm_eps)
        if config.attention_gate is not None:
            gate_size = q_size if config.attention_gate == "elementwise" else config.num_attention_heads
            self.gate_proj = nn.Linear(config.hidden_size, gate_size, bias=False)
        self.tap = AttentionTap()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        shared_sequence: SharedSequence | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        query, key = self._project_normalized(hidden_states)
        value = self.v_proj(hidden_states).view(*input_shape, -1, self.head_dim).transpose(1, 2)
        query, key = self.tap(*self._rotate(query, key, *position_embeddings))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if shared_sequence is not None:
            attend = partial(shared_sequence.attend, attend)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        if self.config.attention_gate is not None:
            # Head-wise the last axis is 1 and broadcasts over the head.
            gate = self.gate_proj(hidden_states).view(*input_shape, output.shape[-2], -1)
            output = output * gate.sigmoid()
        return self.o_proj(output.reshape(*input_shape, -1)), weights

    def _project_normalized(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries and keys `(B, heads, S, head_dim)`, normalised per head or over all heads if configured."""
        query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        if self.config.use_qk_norm and self.config.qk_norm_scope == "full":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.view(heads), key.view(heads)
        if self.config.use_qk_norm and self.config.qk_norm_scope == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        return query.transpose(1, 2), key.transpose(1, 2)

    @staticmethod
    def _rotate(
        query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn the first `rotary_dim` channels of every head of `(B, heads, S, head_dim)`; the rest pass through."""
        rotary_dim = cos.shape[-1]
        if rotary_dim == query.shape[-1]:
            return apply_rotary_pos_emb(query, key, cos, sin)
        rotated = apply_rotary_pos_emb(query[..., :rotary_dim], key[..., :rotary_dim], cos, sin)
        pairs = zip(rotated, (query, key), strict=True)
        query, key = (torch.cat((turned, x[..., rotary_dim:]), dim=-1) for turned, x in pairs)
        return query, key


class MoEDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention followed by a pre-norm MLP, dense or sparse as `config.mlp_layer_types` says."""

    def __init__(self, config: MoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = MoEAttention(config, layer_idx)
        sparse = config.mlp_layer_types[layer_idx] == "sparse"
        self.mlp = MoESparseBlock(config) if sparse else MoEMLP(config, config.intermediate_size)
        self.input_layernorm = MoERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MoERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_dropout = config.hidden_dropout

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attention, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + F.dropout(attention, self.hidden_dropout, self.training)
        update = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + F.dropout(update, self.hidden_dropout, self.training)


class MoEPreTrainedModel(PreTrainedModel):
    """What every `moe_hf` model class tells Transformers about itself."""

    config: MoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoEDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(RouterTap, index=0),
        "router_indices": OutputRecorder(RouterTap, index=1),
        "router_drops": OutputRecorder(RouterTap, index=2),
        "hidden_states": MoEDecoderLayer,
        "attentions": MoEAttention,
    }

    def __init__(self, config: MoEConfig, *args, **kwargs) -> None:
        # `from_pretrained` sets overrides after the configuration was validated.
        config.validate_architecture()
        super().__init__(config, *args, **kwargs)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Choose our own kernel where nothing is asked for, unless this is a copy of the file far from the kernel."""
        if requested_experts is None and "moe_hf" in ALL_EXPERTS_FUNCTIONS:
            requested_experts = "moe_hf"
        return super().get_correct_experts_implementation(requested_experts)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs
    ) -> None:
        settings = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and settings.get("use_reentrant") is False and "context_fn" not in settings:
            gradient_checkpointing_func = partial(gradient_checkpointing_func, context_fn=keep_choices)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MoEExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, MoERouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)


def _same_document(position_ids: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Return the mask by which no token of packed rows sees another document.

    Args:
        position_ids: `(B, S)`; where they do not go up by one, a document begins.
    """
    begins = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1
    document = begins.cumsum(dim=-1)
    return lambda row, head, query, key: document[row, query] == document[row, key]


class MoEModel(MoEPreTrainedModel):
    """The decoder without a head: token ids in, final hidden states out."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        # No padding_idx: where one token pads and ends texts, it would never learn. Padding is masked anyway.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MoEDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = MoERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MoERotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        shared_sequence: SharedSequence | None = None,
        **kwargs,
    ) -> MoEModelOutput:
        """Run the decoder.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): or `inputs_embeds`, not both.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 0 on padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): where they restart without an
                attention mask and cache, a new document begins and attention does not cross.
            past_key_values (`Cache`): keys and values of earlier tokens.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`).
            use_cache (`bool`): return the cache.
            shared_sequence (`SharedSequence`): given where every rank of a group holds a piece of the same sequences;
                the other arguments are then this rank's piece.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, not both and not neither.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        documents_apart = None
        if position_ids is not None and attention_mask is None and past_key_values is None:
            documents_apart = _same_document(position_ids.expand(inputs_embeds.shape[0], -1))
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        causal_mask = None
        if shared_sequence is None:  # which otherwise has the mask of the whole sequences
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                # Not the positions, whose jumps Transformers would look for on the host.
                and_mask_function=documents_apart,
            )
        hidden_states = F.dropout(inputs_embeds, self.config.hidden_dropout, self.training)
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                shared_sequence=shared_sequence,
                **kwargs,
            )
        return MoEModelOutput(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class MoEForCausalLM(MoEPreTrainedModel, GenerationMixin):
    """The decoder with a language-modelling head and the router losses."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    # Sums router statistics over the data-parallel ranks while training; whoever trains in parallel sets it.
    reduce_router_statistics: StatisticsReducer | None = None

    # `(L, E)` int64 with `router_balancing="loss_free"`: assignments of this rank's tokens in training since whoever
    # moves the biases has last set it to `None`.
    assignment_counts: torch.Tensor | None = None

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        self.model = MoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = LanguageHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_router_statistics: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        num_tokens_in_batch: torch.Tensor | float | None = None,
        **kwargs,
    ) -> MoECausalLMOutput:
        """Predict the next token, and compute the loss when `labels` are given.

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): -100 is ignored. The router losses
                are part of `loss` whenever they are asked for by `router_balancing` and their coefficients.
            output_router_logits (`bool`): return `router_logits`, one `(batch_size * sequence_length, num_experts)`
                tensor for each sparse layer.
            output_router_statistics (`bool`): with `labels`, return `router_entropy` and `router_logit_max`.
            logits_to_keep (`int` or `torch.Tensor`): compute logits for the last n positions only, 0 for all.
            skip_logits (`bool`): with `labels`, return no logits, so that those of the whole batch are never there at
                once; without gradients each sequence's cross-entropy is returned besides.
            num_tokens_in_batch (`torch.Tensor` or `float`): unmasked tokens of the whole batch, over all ranks and
                accumulation steps; with `num_items_in_batch` the loss is this micro-batch's additive share.
            shift_labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): the token that each position is
                to predict, where `labels`, which must be given besides, end before it does.
            label_smoothing (`float`): share of the uniform distribution in the target of each prediction.

        The other arguments are those of `MoEModel.forward`.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        # Not in the signature, where Trainer would take them for columns that every evaluation needs.
        shift_labels, label_smoothing = kwargs.pop("shift_labels", None), kwargs.pop("label_smoothing", 0.0)
        describes_routing = labels is not None and self.config.num_sparse_layers > 0
        counts_assignments = self._counts_assignments()
        outputs: MoEModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits or describes_routing,
            output_router_indices=describes_routing or counts_assignments,
            output_router_drops=describes_routing,
            **kwargs,
        )
        logits, loss = None, None
        settings = {"label_smoothing": label_smoothing, "num_items_in_batch": kwargs.get("num_items_in_batch")}
        settings["z_loss_coef"] = self.config.output_z_loss_coef
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL) if shift_labels is None else shift_labels
        if skip_logits and labels is not None:
            loss = loss_in_chunks(self.lm_head, outputs.last_hidden_state, targets, **settings)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
            if labels is not None:
                plain = self.loss_function(logits, labels, self.vocab_size, shift_labels=shift_labels, **kwargs)
                loss = loss_of_logits(plain, logits, targets, **settings)
        result = MoECausalLMOutput(
            # Given at once: an output's entries are ordered as they come, and `loss` is the first by convention.
            loss=loss and loss.total,
            ce_loss=loss and loss.cross_entropy,
            logits=logits,
            sequence_ce_losses=loss and loss.by_sequence,
            output_z_loss=loss and loss.z_loss,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
        )
        if describes_routing or counts_assignments:
            token_mask = self._token_mask(outputs, attention_mask)
            tokens_per_expert = count_layers(outputs.router_indices, self.config.num_experts, token_mask)
        if counts_assignments:
            # From what was recorded, not inside the router: recomputation calls that a second time.
            counts, earlier = tokens_per_expert.sum(dim=1), self.assignment_counts
            self.assignment_counts = counts if earlier is None else earlier + counts
        if describes_routing:
            self._describe_routing(result, outputs, token_mask, tokens_per_expert, output_router_statistics)
            if num_tokens_in_batch is None and kwargs.get("num_items_in_batch") is not None:
                num_tokens_in_batch = self._estimate_num_tokens(token_mask, labels, kwargs["num_items_in_batch"])
            self._add_router_losses(result, outputs, token_mask, num_tokens_in_batch, kwargs.get("shared_sequence"))
        return result

    def generate(self, *args, **kwargs):
        """As in `GenerationMixin`.

        Raises:
            ValueError: the model's experts choose their tokens.
        """
        if self.config.num_sparse_layers and self.config.router_balancing == "expert_choice":
            raise ValueError(
                "router_balancing='expert_choice' cannot generate: which tokens an expert takes depends on later ones, "
                "which are not there yet; train with another method to generate."
            )
        return super().generate(*args, **kwargs)

    @staticmethod
    def _estimate_num_tokens(token_mask: torch.Tensor, labels: torch.Tensor, num_items_in_batch) -> torch.Tensor:
        """Take the share that a micro-batch has of the batch's labels for its share of the tokens.

        For a plain `Trainer`, which counts labels only; `moe_hf`'s own counts the tokens.
        """
        num_items = (labels[:, 1:] != -100).sum()
        return token_mask.numel() * num_items_in_batch / num_items.clamp(min=1e-9)

    @staticmethod
    def _token_mask(outputs: MoEModelOutput, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Return `(B, S)` bool, `False` on padding."""
        shape = outputs.last_hidden_state.shape[:2]
        if attention_mask is not None and attention_mask.shape == shape:
            return attention_mask.bool()
        return torch.ones(shape, dtype=torch.bool, device=outputs.last_hidden_state.device)

    def _counts_assignments(self) -> bool:
        """Whether this is a forward pass of training that the routers' biases are to be moved by."""
        moves_biases = self.config.router_balancing == "loss_free" and self.config.num_sparse_layers > 0
        return moves_biases and self.training and torch.is_grad_enabled()

    def _describe_routing(
        self,
        result: MoECausalLMOutput,
        outputs: MoEModelOutput,
        token_mask: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        with_statistics: bool,
    ) -> None:
        result.tokens_per_expert = tokens_per_expert
        if outputs.router_drops:
            drops = (dropped.to(token_mask.device).sum(dim=-1) for dropped in outputs.router_drops)
            result.dropped_assignments = torch.stack([(n.view_as(token_mask) * token_mask).sum(dim=-1) for n in drops])
        if with_statistics:
            statistics = router_statistics(outputs.router_logits, token_mask, self.config.scoring_func)
            result.router_entropy, result.router_logit_max = statistics

    def _add_router_losses(
        self,
        result: MoECausalLMOutput,
        outputs: MoEModelOutput,
        token_mask: torch.Tensor,
        num_tokens_in_batch: torch.Tensor | float | None,
        shared_sequence: SharedSequence | None,
    ) -> None:
        config, tokens_per_expert = self.config, result.tokens_per_expert
        if shared_sequence is not None and (config.router_aux_loss_scope != "global" or not self.training):
            # What is balanced are sequences, not this rank's pieces of them.
            tokens_per_expert = shared_sequence.sum(tokens_per_expert)
        # Evaluation uses local statistics: ranks with uneven batches must never wait for each other. Nor is it worth a
        # message what a loss would be that is none.
        reduces = self.training and (config.has_balancing_loss or num_tokens_in_batch is None)
        losses = router_losses(
            outputs.router_logits,
            tokens_per_expert,
            token_mask,
            scope=config.router_aux_loss_scope,
            num_tokens_in_batch=num_tokens_in_batch,
            reduce_statistics=self.reduce_router_statistics if reduces else None,
            scoring_func=config.scoring_func,
        )
        result.aux_loss, result.z_loss = losses.aux.sum(), losses.z.sum()
        result.layer_aux_losses, result.layer_z_losses = losses.aux.detach(), losses.z.detach()
        weighted = config.router_z_loss_coef * result.z_loss
        if config.has_balancing_loss:
            weighted = config.router_aux_loss_coef * result.aux_loss + weighted
        result.loss = result.loss + weighted.to(result.loss.device)


__all__ = ["MoEForCausalLM", "MoEModel", "MoEPreTrainedModel"]
