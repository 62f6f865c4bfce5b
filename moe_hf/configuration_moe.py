"""Configuration of the `moe_hf` architecture: plain values and the rules they must obey."""

import difflib
import math
from dataclasses import fields
from importlib.util import find_spec

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from .router_rules import check_router, check_router_values

# Keys that Transformers itself writes into config.json or passes to a config besides its declared fields.
_TRANSFORMERS_KEYS = {
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "original_max_position_embeddings",
    "output_attentions",
    "partial_rotary_factor",
    "per_layer_config",
    "quantization_config",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
}

_HAS_EXPERT_DISPATCH = find_spec("transformers.distributed.expert_parallel") is not None or None

# Everything that one of the RoPE scalings reads.
_ROPE_KEYS = {*RopeParameters.__annotations__, "type", "truncate", "mscale", "mscale_all_dim"}


@strict
class MoEConfig(PreTrainedConfig):
    r"""Describe a decoder-only transformer whose layers are dense or mixtures of experts.

    Which layers are sparse is told by `mlp_layer_types`, or by one of two shorthands: `moe_layer_indices`, or
    `first_k_dense_replace` together with `decoder_sparse_step`. The list that a shorthand gives is stored beside it.

    Args:
        vocab_size (`int`, defaults to 50304): rows of the token embedding.
        hidden_size (`int`, defaults to 1024): width of the residual stream.
        intermediate_size (`int`, defaults to 2816): inner width of a dense layer's MLP.
        moe_intermediate_size (`int`, *optional*): inner width of one expert; `intermediate_size` when not given.
        num_hidden_layers (`int`, defaults to 16): number of decoder layers.
        num_attention_heads (`int`, defaults to 16): number of query heads.
        num_key_value_heads (`int`, *optional*): number of key and value heads; `num_attention_heads` when not given.
        head_dim (`int`, *optional*): width of one head; `hidden_size // num_attention_heads` when not given.
        hidden_act (`str`, defaults to `"silu"`): gate activation of the SwiGLU MLPs; nothing else is supported.
        max_position_embeddings (`int`, defaults to 2048): longest sequence the model is meant for.
        rope_parameters (`dict`, *optional*): RoPE base and scaling, as in every Transformers 5 model.
        attention_bias (`bool`, defaults to `False`): biases in the q, k and v projections.
        attention_output_bias (`bool`, *optional*): bias in the o projection; `attention_bias` when not given (Qwen2
            has biases in q, k and v only).
        attention_dropout (`float`, defaults to 0.0): dropout on the attention weights, training only.
        hidden_dropout (`float`, defaults to 0.0): dropout on the embeddings and on what attention and MLPs add to the
            residual stream, training only.
        use_qk_norm (`bool`, defaults to `False`): RMS-normalise queries and keys before RoPE.
        qk_norm_scope (`str`, defaults to `"head"`): `"head"` normalises each head (Qwen3), `"full"` the whole
            projection (OLMoE).
        attention_gate (`str`, *optional*): `"headwise"` or `"elementwise"`: multiply the attention output by a
            sigmoid gate computed from the layer's input, before `o_proj` (Qiu et al. 2025, arXiv 2505.06708).
        num_experts (`int`, defaults to 8): experts of every sparse layer; 0 makes the model dense.
        num_experts_per_tok (`int`, defaults to 2): experts that each token visits (k).
        mlp_layer_types (`list[str]`, *optional*): `"dense"` or `"sparse"` for every layer.
        moe_layer_indices (`list[int]`, *optional*): zero-based indices of the sparse layers.
        decoder_sparse_step (`int`, defaults to 1): every n-th layer is sparse: layer i when (i + 1) % n == 0.
        first_k_dense_replace (`int`, defaults to 0): the first k layers are dense.
        shared_expert_intermediate_size (`int`, defaults to 0): inner width of the expert that sees every token, in
            each sparse layer; 0 for none.
        shared_expert_gate (`bool`, defaults to `False`): weigh the shared expert by a sigmoid gate (Qwen2-MoE).
        norm_topk_prob (`bool`, defaults to `True`): scale a token's k routing weights to sum to 1.
        routed_scaling_factor (`float`, defaults to 1.0): factor on the routing weights, after normalisation.
        scoring_func (`str`, defaults to `"softmax"`): scores of a token's experts: `"softmax"` over all of them, or
            `"sigmoid"` of each by itself (DeepSeek-V3, arXiv 2412.19437).
        n_group (`int`, defaults to 1): equal groups of consecutive experts for group-limited routing; 1 for none.
        topk_group (`int`, defaults to 1): groups, the best ones, among whose experts a token may choose.
        group_scoring_func (`str`, defaults to `"top2_sum"`): what a group is worth: `"top2_sum"`, the sum of its two
            best scores (DeepSeek-V3), or `"max"`, the best one (DeepSeek-V2).
        topk_before_softmax (`bool`, defaults to `False`): take the softmax over the k largest logits (Mixtral) instead
            of the k largest of a softmax over all (Switch, GShard).
        router_balancing (`str`, defaults to `"aux_loss"`): how the load is balanced: `"aux_loss"` adds the
            load-balancing loss to the loss; `"loss_free"` adds a bias to the scores for the choice only, the buffer
            `e_score_correction_bias`, which training moves against the load (arXiv 2408.15664); `"sinkhorn"` chooses
            by a balanced assignment of the rank's tokens in training, plainly otherwise (S-BASE, arXiv 2202.01169);
            `"expert_choice"` lets experts choose tokens, which is not causal (arXiv 2202.09368); `"none"` leaves it.
        sinkhorn_iterations (`int`, defaults to 8): normalisations of rows and columns with `"sinkhorn"`.
        router_bias_update_speed (`float`, defaults to 0.001): by how much `"loss_free"` moves each expert's bias at
            every optimizer step.
        router_aux_loss_coef (`float`, defaults to 0.01): weight of the load-balancing loss of each sparse layer;
            counts with `router_balancing="aux_loss"`, and with `"loss_free"` in the scope `"sequence"`.
        router_aux_loss_scope (`str`, defaults to `"global"`): `"global"` counts the load over all data-parallel
            ranks, `"local"` over the tokens of one rank, `"sequence"` over each sequence by itself, also beside
            `router_balancing="loss_free"` (DeepSeek-V3's complementary loss, arXiv 2412.19437, with weight 0.0001).
        router_z_loss_coef (`float`, defaults to 0.001): weight of the router z-loss of each sparse layer.
        router_jitter_noise (`float`, defaults to 0.0): in training, multiply the router's input by uniform noise
            between 1 - this and 1 + this (Switch, arXiv 2101.03961).
        expert_capacity_factor (`float`, *optional*): in training, an expert of a layer takes at most this times its
            even share of one rank's micro-batch; the tokens beyond are carried by the residual alone. Dropless when
            not given. With `"expert_choice"` it is what every expert takes, 1 when not given.
        token_drop_policy (`str`, defaults to `"probability"`): whom an expert takes first: `"probability"`, the largest
            routing weights, or `"position"`, first choices in the order of the tokens, then second ones (GShard).
        output_z_loss_coef (`float`, defaults to 0.0): weight of the z-loss of the predictions, the squared logsumexp of
            the vocabulary's logits (PaLM, arXiv 2204.02311, uses 0.0001).
        output_router_logits (`bool`, defaults to `False`): return the router logits. The losses do not depend on it.
        initializer_range (`float`, defaults to 0.02): standard deviation of the initial weights.
        rms_norm_eps (`float`, defaults to 1e-6): epsilon of every RMSNorm.

    Raises:
        ValueError: for every inconsistent setting and for unknown keys, with one sentence naming the field.
    """

    model_type = "moe_hf"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "ce_loss",
        "output_z_loss",
        "sequence_ce_losses",
        "aux_loss",
        "z_loss",
        "layer_aux_losses",
        "layer_z_losses",
        "tokens_per_expert",
        "dropped_assignments",
        "router_entropy",
        "router_logit_max",
    ]
    attribute_map = {"num_local_experts": "num_experts"}

    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.gate_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    # Older Transformers dispatch tokens inside a router of another form; there is no plan for them.
    base_model_ep_plan = _HAS_EXPERT_DISPATCH and {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50304
    hidden_size: int = 1024
    intermediate_size: int = 2816
    moe_intermediate_size: int | None = None
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    use_qk_norm: bool = False
    qk_norm_scope: str = "head"
    attention_gate: str | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    mlp_layer_types: list[str] | None = None
    moe_layer_indices: list[int] | None = None
    decoder_sparse_step: int = 1
    first_k_dense_replace: int = 0
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    norm_topk_prob: bool = True
    routed_scaling_factor: float | int = 1.0
    scoring_func: str = "softmax"
    topk_before_softmax: bool = False
    n_group: int = 1
    topk_group: int = 1
    group_scoring_func: str = "top2_sum"
    router_balancing: str = "aux_loss"
    sinkhorn_iterations: int = 8
    router_bias_update_speed: float | int = 0.001
    router_aux_loss_coef: float | int = 0.01
    router_aux_loss_scope: str = "global"
    router_z_loss_coef: float | int = 0.001
    router_jitter_noise: float | int = 0.0
    expert_capacity_factor: float | int | None = None
    token_drop_policy: str = "probability"
    output_z_loss_coef: float | int = 0.0
    output_router_logits: bool = False
    initializer_range: float | int = 0.02
    rms_norm_eps: float | int = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs) -> None:
        self._reject_unknown_keys(kwargs)
        self._take_alias(kwargs)
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        # What is derived below divides by sizes and counts up to them.
        self._check_ranges()
        self._check_heads()
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.mlp_layer_types is None:
            self.mlp_layer_types = self.derive_mlp_layer_types()
        if self.use_qk_norm and self.qk_norm_scope == "full":
            # The norm spans all heads, so every tensor-parallel rank needs the whole projection.
            gathered = {f"layers.*.self_attn.{name}_proj": "colwise_gather_output" for name in "qkv"}
            gathered |= {"layers.*.self_attn.gate_proj": "colwise_gather_output"}
            gathered |= {"layers.*.self_attn.o_proj": "rowwise_split_input"}
            plan = {k: v for k, v in self.base_model_tp_plan.items() if not k.endswith("_norm")}
            self.base_model_tp_plan = {**plan, **gathered}
        super().__post_init__(**kwargs)
        self._check_rope()
        # The strict base class validates too, but wraps the sentence in its own; said here first, it stays plain.
        self.validate_architecture()

    def derive_mlp_layer_types(self) -> list[str]:
        """Return the layer types that the shorthand fields describe, `num_hidden_layers` of them."""
        num_layers = self.num_hidden_layers
        if self.num_experts == 0:
            if self.moe_layer_indices:
                raise ValueError(
                    f"moe_layer_indices={self.moe_layer_indices} but num_experts=0; give num_experts at least 1."
                )
            sparse: set[int] = set()
        elif self.moe_layer_indices is not None:
            if self.decoder_sparse_step != 1 or self.first_k_dense_replace != 0:
                raise ValueError(
                    f"moe_layer_indices={self.moe_layer_indices} and decoder_sparse_step={self.decoder_sparse_step}, "
                    f"first_k_dense_replace={self.first_k_dense_replace} both say which layers are sparse; give one."
                )
            outside = [i for i in self.moe_layer_indices if not 0 <= i < num_layers]
            if outside or len(set(self.moe_layer_indices)) != len(self.moe_layer_indices):
                raise ValueError(
                    f"moe_layer_indices={self.moe_layer_indices} must be different layers between 0 and "
                    f"{num_layers - 1} (num_hidden_layers={num_layers})."
                )
            sparse = set(self.moe_layer_indices)
        else:
            step, first = self.decoder_sparse_step, self.first_k_dense_replace
            if step < 1:
                raise ValueError(f"decoder_sparse_step={step} must be at least 1 (1 makes every layer sparse).")
            if not 0 <= first <= num_layers:
                raise ValueError(f"first_k_dense_replace={first} must be between 0 and num_hidden_layers={num_layers}.")
            sparse = {i for i in range(first, num_layers) if (i + 1) % step == 0}
        return ["sparse" if i in sparse else "dense" for i in range(num_layers)]

    @property
    def has_balancing_loss(self) -> bool:
        """Whether the load-balancing loss is part of the loss, with `router_aux_loss_coef`."""
        complements = self.router_balancing == "loss_free" and self.router_aux_loss_scope == "sequence"
        return self.num_sparse_layers > 0 and (self.router_balancing == "aux_loss" or complements)

    @property
    def num_sparse_layers(self) -> int:
        """Number of mixture-of-experts layers."""
        return self.mlp_layer_types.count("sparse")

    def validate_architecture(self) -> None:
        """Raise `ValueError` with one sentence when the fields contradict each other."""
        self._check_ranges()
        self._check_heads()
        self._check_layer_types()
        self._check_experts()

    def _reject_unknown_keys(self, kwargs: dict) -> None:
        declared = {field.name for field in fields(self)}
        known = declared | _TRANSFORMERS_KEYS | set(GenerationConfig._get_default_generation_params())
        for key, value in kwargs.items():
            if key in known or key.startswith("_") or key in self.attribute_map:
                continue
            nearest = difflib.get_close_matches(key, sorted(declared), n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "see MoEConfig for the fields there are."
            raise ValueError(f"{key}={value!r} is not a field of MoEConfig; {hint}")

    def _take_alias(self, kwargs: dict) -> None:
        """Apply `num_local_experts` before anything is derived from `num_experts`."""
        if (given := kwargs.pop("num_local_experts", None)) is None:
            return
        if self.num_experts not in (given, type(self).num_experts):
            raise ValueError(f"num_local_experts={given} and num_experts={self.num_experts} are one setting; give one.")
        self.num_experts = given

    def _check_ranges(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "moe_intermediate_size",
            "num_hidden_layers",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("initializer_range", "output_z_loss_coef", "shared_expert_intermediate_size"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} must be a finite number that is not negative.")
        if not (math.isfinite(self.rms_norm_eps) and self.rms_norm_eps > 0):
            raise ValueError(f"rms_norm_eps={self.rms_norm_eps} must be a finite number above 0.")
        for name in ("attention_dropout", "hidden_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1.")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(f"{name}={value} must lie in the vocabulary, below vocab_size={self.vocab_size}.")
        check_router_values(self)
        choices = {
            "hidden_act": ("silu",),
            "qk_norm_scope": ("head", "full"),
            "attention_gate": (None, "headwise", "elementwise"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, allowed))}.")

    def _check_heads(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads < 1 or kv_heads < 1:
            raise ValueError(f"num_attention_heads={heads} and num_key_value_heads={kv_heads} must both be at least 1.")
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}.")
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={heads}; "
                "change one of them or give head_dim."
            )
        head_dim = self.hidden_size // heads if self.head_dim is None else self.head_dim
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim={head_dim} must be an even number above 0, because RoPE rotates pairs.")

    def _check_rope(self) -> None:
        rope_type = self.rope_parameters["rope_type"]
        known = ["default", *ROPE_INIT_FUNCTIONS]
        if rope_type not in known:
            raise ValueError(f"rope_parameters has rope_type={rope_type!r}; it must be one of {', '.join(known)}.")
        try:
            self.validate_rope()
        except KeyError as error:
            raise ValueError(f"rope_parameters={self.rope_parameters}: {error.args[0]}.") from None
        # Transformers only warns about these, or not at all.
        for name in ("rope_theta", "factor", "partial_rotary_factor"):
            value = self.rope_parameters.get(name, 1.0)
            valid = isinstance(value, (int, float)) and math.isfinite(value) and value > 0
            if not valid or (name == "partial_rotary_factor" and value > 1):
                limit = " and at most 1" if name == "partial_rotary_factor" else ""
                raise ValueError(f"rope_parameters has {name}={value}; it must be a finite number above 0{limit}.")
        rotary_dim = int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0))
        if rotary_dim < 2 or rotary_dim % 2:
            raise ValueError(
                f"partial_rotary_factor={self.rope_parameters['partial_rotary_factor']} of head_dim={self.head_dim} "
                f"rotates {rotary_dim} channels; it must be an even number above 0."
            )
        if unknown := sorted(self.rope_parameters.keys() - _ROPE_KEYS):
            nearest = difflib.get_close_matches(unknown[0], sorted(_ROPE_KEYS), n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(sorted(_ROPE_KEYS))}."
            raise ValueError(f"rope_parameters has an unknown key {unknown[0]!r}; {hint}")

    def _check_layer_types(self) -> None:
        types = self.mlp_layer_types
        unknown = [t for t in types if t not in ("dense", "sparse")]
        if unknown:
            raise ValueError(f"mlp_layer_types contains {unknown[0]!r}; a layer is 'dense' or 'sparse'.")
        if len(types) != self.num_hidden_layers:
            raise ValueError(
                f"mlp_layer_types has {len(types)} entries but num_hidden_layers={self.num_hidden_layers}; "
                "give one entry for every layer."
            )
        shorthand = (self.moe_layer_indices, self.decoder_sparse_step, self.first_k_dense_replace)
        if shorthand != (None, 1, 0) and types != (derived := self.derive_mlp_layer_types()):
            raise ValueError(
                f"mlp_layer_types={types} contradicts moe_layer_indices={self.moe_layer_indices}, decoder_sparse_step="
                f"{self.decoder_sparse_step}, first_k_dense_replace={self.first_k_dense_replace}, which give {derived}."
            )

    def _check_experts(self) -> None:
        if self.num_experts < 0:
            raise ValueError(f"num_experts={self.num_experts} must be at least 0 (0 makes the model dense).")
        if self.num_experts == 0:
            if "sparse" in self.mlp_layer_types:
                raise ValueError("mlp_layer_types contains 'sparse' but num_experts=0; give num_experts at least 1.")
            if self.shared_expert_intermediate_size:
                raise ValueError(
                    f"shared_expert_intermediate_size={self.shared_expert_intermediate_size} has no effect with "
                    "num_experts=0; leave it out."
                )
            return
        if "sparse" not in self.mlp_layer_types:
            raise ValueError(
                f"num_experts={self.num_experts} but no layer is sparse: num_hidden_layers={self.num_hidden_layers}, "
                f"decoder_sparse_step={self.decoder_sparse_step}, moe_layer_indices={self.moe_layer_indices}; "
                "make one sparse, or set num_experts=0 for a dense model."
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must be between 1 and num_experts={self.num_experts}."
            )
        check_router(self)
        if self.shared_expert_gate and self.shared_expert_intermediate_size == 0:
            raise ValueError(
                "shared_expert_gate=True needs a shared expert; set shared_expert_intermediate_size above 0."
            )


__all__ = ["MoEConfig"]
