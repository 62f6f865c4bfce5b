"""What stages know of their own layers adds up to what the whole model would tell."""

import torch
from small import small_config

from moe_hf.modeling_outputs import MoECausalLMOutput
from moe_hf.training.pipeline_outputs import WholeModelOutputs

STATISTICS = ("layer_aux_losses", "layer_z_losses", "tokens_per_expert", "router_entropy", "router_logit_max")


def outputs_of(num_layers: int, value: float, **changes) -> MoECausalLMOutput:
    loss = torch.tensor(value)
    if num_layers == 0:
        return MoECausalLMOutput(loss=loss, ce_loss=loss, **changes)
    return MoECausalLMOutput(
        loss=loss,
        ce_loss=loss,
        aux_loss=loss,
        z_loss=loss,
        layer_aux_losses=torch.full((num_layers,), value),
        layer_z_losses=torch.full((num_layers,), 2 * value),
        tokens_per_expert=torch.full((num_layers, 2, 4), int(value)),
        router_entropy=torch.full((num_layers, 2), value),
        router_logit_max=torch.full((num_layers, 2), value),
        **changes,
    )


def test_layers_stand_in_their_places_and_stages_without_routers_give_zeros():
    config = small_config(num_hidden_layers=6, decoder_sparse_step=2)  # layers 1, 3, 5
    ranges, counts = (range(0, 1), range(1, 4), range(4, 6)), (0, 2, 1)
    stages = [
        WholeModelOutputs(config, here).of(outputs_of(count, float(number)), 2, statistics=True, training=True)
        for number, (here, count) in enumerate(zip(ranges, counts, strict=True))
    ]
    assert all(getattr(stage, name) is not None for stage in stages for name in STATISTICS)
    total = {name: sum(getattr(stage, name) for stage in stages) for name in STATISTICS}
    assert total["layer_z_losses"].tolist() == [2.0, 2.0, 4.0]
    assert total["tokens_per_expert"][:, 0, 0].tolist() == [1, 1, 2]
    assert total["router_entropy"].shape == (3, 2)
    assert [float(stage.aux_loss) for stage in stages] == [0.0, 1.0, 2.0]


def test_drops_are_told_where_there_is_a_capacity():
    for factor, expected in ((None, False), (1.0, True)):
        whole = WholeModelOutputs(small_config(expert_capacity_factor=factor), range(0, 1))
        result = whole.of(outputs_of(0, 0.0), 2, statistics=False, training=True)
        assert (result.dropped_assignments is not None) == expected
        assert whole.of(outputs_of(0, 0.0), 2, statistics=False, training=False).dropped_assignments is None


def test_dense_models_have_no_routing():
    config = small_config(num_experts=0, shared_expert_intermediate_size=0, shared_expert_gate=False)
    result = WholeModelOutputs(config, range(0, 2)).of(outputs_of(0, 3.0), 2, statistics=True, training=True)
    assert result.tokens_per_expert is None and result.aux_loss is None and float(result.loss) == 3.0


def test_sequences_have_a_cross_entropy_in_evaluation_on_every_stage():
    whole = WholeModelOutputs(small_config(), range(0, 2))
    with torch.no_grad():
        result = whole.of(outputs_of(1, 1.0), 2, statistics=False, training=False)
    assert result.sequence_ce_losses.tolist() == [0.0, 0.0]


def test_z_loss_of_the_predictions_is_told_on_every_stage_if_there_is_one():
    for coef, told, expected in ((0.1, None, 0.0), (0.1, torch.tensor(5.0), 5.0), (0.0, None, None)):
        whole = WholeModelOutputs(small_config(output_z_loss_coef=coef), range(0, 2))
        result = whole.of(outputs_of(1, 1.0, output_z_loss=told), 2, statistics=False, training=True)
        assert result.output_z_loss == expected


def test_values_by_layer_are_spread():
    whole = WholeModelOutputs(small_config(num_hidden_layers=6, decoder_sparse_step=2), range(2, 4))
    assert whole.by_layer(torch.tensor([[1.0, 2.0]])).tolist() == [[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]]
