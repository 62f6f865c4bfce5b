"""What each method makes of the matrices of a dense MLP, and whom the routers of virtual groups choose."""

import pytest
import torch

from moe_hf import MoEConfig
from moe_hf.checkpoint.upcycling import Copy, Drop, Granular, Noise
from moe_hf.checkpoint.upcycling.methods import ExpertMatrix, seeded
from moe_hf.errors import ConfigError
from moe_hf.routing import MoERouter

WIDTH, HIDDEN, EXPERTS = 300, 200, 4
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def dense_units() -> dict[str, torch.Tensor]:
    """Three matrices of different means and deviations, and of rows unlike each other."""
    scale = torch.linspace(0.5, 1.5, WIDTH)[:, None]
    return {
        "gate_proj": 0.3 + 0.05 * scale * torch.randn(WIDTH, HIDDEN),
        "up_proj": -0.1 + 0.02 * scale * torch.randn(WIDTH, HIDDEN),
        "down_proj": 0.7 * scale + 0.4 * torch.randn(WIDTH, HIDDEN),
    }


def make_all(method, dense: dict[str, torch.Tensor], layer: str = "model.layers.1.mlp", seed: int = 3) -> list[dict]:
    return [
        {name: method.expert(dense[name], ExpertMatrix(layer, name, expert, EXPERTS, seed)) for name in PROJECTIONS}
        for expert in range(EXPERTS)
    ]


def test_copies_are_bit_equal():
    dense = dense_units()
    for expert in make_all(Copy(), dense):
        assert all(torch.equal(expert[name], dense[name]) for name in PROJECTIONS)


# --------------------------------------------------------------------------------------------------------------------
# Noise


@pytest.mark.parametrize(("std", "fraction"), [(0.1, 0.5), (0.02, 1.0), (1.5, 0.2)])
def test_noise_has_the_deviation_and_the_share_that_it_says(std, fraction):
    dense = dense_units()
    for expert in make_all(Noise(std=std, fraction=fraction), dense):
        for name, weight in dense.items():
            noise = expert[name] - weight
            hit = noise != 0
            # 60,000 elements: three standard errors are 0.006 of the share, and some 0.02 of the deviation.
            assert hit.float().mean().item() == pytest.approx(fraction, abs=0.007)
            assert noise[hit].std().item() == pytest.approx(std * weight.std().item(), rel=0.02)
            assert noise[hit].mean().abs().item() < 0.04 * std * weight.std().item()
            assert torch.equal(expert[name][~hit], weight[~hit])
            # As often in one row as in any other.
            assert (hit.float().mean(dim=1) - fraction).abs().max() < 0.2


def test_noise_is_another_in_every_matrix_expert_layer_and_seed():
    dense = {name: torch.randn(WIDTH, HIDDEN) for name in PROJECTIONS}
    dense["up_proj"] = dense["down_proj"] = dense["gate_proj"]
    method = Noise(fraction=1.0)
    noises = [
        (expert[name] - dense[name]).flatten()
        for layer, seed in (("model.layers.1.mlp", 3), ("model.layers.2.mlp", 3), ("model.layers.1.mlp", 4))
        for expert in make_all(method, dense, layer, seed)
        for name in PROJECTIONS
    ]
    correlations = torch.corrcoef(torch.stack(noises)) - torch.eye(len(noises))
    assert len(noises) == 36 and correlations.abs().max() < 0.03


# --------------------------------------------------------------------------------------------------------------------
# Drop


def dropped_units(made: torch.Tensor, weight: torch.Tensor) -> set[int]:
    return set((made != weight).any(dim=1).nonzero().flatten().tolist())


@pytest.mark.parametrize(("ratio", "count"), [(0.5, 150), (0.29, 87), (0.1234, 37), (0.99, 297)])
def test_drop_draws_the_same_units_of_all_three_matrices_anew(ratio, count):
    dense = dense_units()
    for expert in make_all(Drop(ratio), dense):
        units = dropped_units(expert["gate_proj"], dense["gate_proj"])
        assert len(units) == count
        assert dropped_units(expert["up_proj"], dense["up_proj"]) == units
        assert dropped_units(expert["down_proj"], dense["down_proj"]) == units
        for name, weight in dense.items():
            changed = expert[name][sorted(units)] != weight[sorted(units)]
            assert changed.float().mean() > 0.999  # the whole unit, not a part of it


def test_dropped_units_get_mean_and_deviation_of_what_was_dropped():
    dense = dense_units()
    # What stays is far from what goes: the statistics must be those of the dropped weights alone.
    units = sorted(dropped_units(make_all(Drop(0.5), dense)[2]["gate_proj"], dense["gate_proj"]))
    for weight in dense.values():
        weight[[i for i in range(WIDTH) if i not in units]] += 50.0
    expert = make_all(Drop(0.5), dense)[2]
    for name, weight in dense.items():
        old, new = weight[units].double(), expert[name][units].double()
        deviation = ((old - old.mean()) ** 2).mean().sqrt().item()
        # 30,000 elements: three standard errors are 0.017 deviations of the mean, 0.012 of the deviation.
        assert new.mean().item() == pytest.approx(old.mean().item(), abs=0.018 * deviation)
        assert ((new - new.mean()) ** 2).mean().sqrt().item() == pytest.approx(deviation, rel=0.013)
        assert abs(torch.corrcoef(torch.stack([old.flatten(), new.flatten()]))[0, 1]) < 0.02
        # Normal: as much beyond two deviations as a normal distribution has.
        beyond = ((new - new.mean()).abs() > 2 * deviation).double().mean().item()
        assert beyond == pytest.approx(0.0455, abs=0.006)


def test_drop_chooses_other_units_for_every_expert_layer_and_seed():
    dense = dense_units()
    sets = [
        frozenset(dropped_units(expert["up_proj"], dense["up_proj"]))
        for layer, seed in (("model.layers.1.mlp", 3), ("model.layers.2.mlp", 3), ("model.layers.1.mlp", 4))
        for expert in make_all(Drop(0.5), dense, layer, seed)
    ]
    assert len(set(sets)) == 12
    # Two independent halves share a quarter of the units: 75 of 300, with a standard deviation of 4.3.
    overlaps = [len(a & b) for i, a in enumerate(sets) for b in sets[:i]]
    assert min(overlaps) > 55 and max(overlaps) < 95
    assert sum(overlaps) / len(overlaps) == pytest.approx(75, abs=3)
    # Every unit is dropped by some expert and kept by some other.
    assert len(frozenset.union(*sets)) == WIDTH and not frozenset.intersection(*sets)


def test_values_of_dropped_units_are_independent():
    dense = {name: torch.randn(WIDTH, HIDDEN) for name in PROJECTIONS}
    dense["up_proj"] = dense["down_proj"] = dense["gate_proj"]
    first, second, *_ = make_all(Drop(0.99), dense)
    values = torch.stack([expert[name].flatten() for expert in (first, second) for name in PROJECTIONS])
    assert (torch.corrcoef(values) - torch.eye(6)).abs().max() < 0.03


@pytest.mark.parametrize("method", [Drop(0.4), Noise(0.3, 0.5)])
def test_what_is_made_depends_on_seed_and_names_only(method):
    dense = dense_units()
    everything = make_all(method, dense)
    torch.manual_seed(99)
    for name in reversed(PROJECTIONS):
        for expert in (3, 0):
            alone = method.expert(dense[name], ExpertMatrix("model.layers.1.mlp", name, expert, EXPERTS, 3))
            assert torch.equal(alone, everything[expert][name])


def test_the_dense_matrix_stays_as_it_is():
    dense = dense_units()
    before = {name: weight.clone() for name, weight in dense.items()}
    for method in (Copy(), Noise(), Granular(2), Drop()):
        make_all(method, dense)
    assert all(torch.equal(weight, before[name]) for name, weight in dense.items())


# --------------------------------------------------------------------------------------------------------------------
# Granular


@pytest.mark.parametrize(("granularity", "num_experts"), [(2, 2), (2, 8), (3, 12), (4, 4)])
def test_granular_experts_are_the_shards_each_as_often(granularity, num_experts):
    dense = dense_units()
    method, width = Granular(granularity), WIDTH // granularity
    assert method.expert_width(WIDTH) == width
    shards = []
    for expert in range(num_experts):
        made = {n: method.expert(dense[n], ExpertMatrix("mlp", n, expert, num_experts, 0)) for n in PROJECTIONS}
        (shard,) = (
            i for i in range(granularity) if torch.equal(made["gate_proj"], dense["gate_proj"][i * width :][:width])
        )
        rows = slice(shard * width, (shard + 1) * width)
        assert torch.equal(made["up_proj"], dense["up_proj"][rows])
        assert torch.equal(made["down_proj"], dense["down_proj"][rows] * granularity)
        shards.append(shard)
    assert [shards.count(i) for i in range(granularity)] == [num_experts // granularity] * granularity


def make_router(granularity: int, num_experts: int, groups_per_tok: int, hidden_size: int, dtype) -> MoERouter:
    std = 0.02
    config = MoEConfig(
        hidden_size=hidden_size, num_experts=num_experts, num_experts_per_tok=granularity * groups_per_tok
    )
    router = MoERouter(config)
    weight = Granular(granularity).router(router.weight.shape, std, seeded(0, "router"))
    assert weight.shape == (num_experts, hidden_size) and weight.dtype == torch.float32
    assert weight.std().item() == pytest.approx(std, rel=0.3)
    router.weight.data = weight.to(dtype)
    return router


def decided(weight: torch.Tensor, tokens: torch.Tensor, num_rows: int, groups_per_tok: int) -> torch.Tensor:
    """Return which tokens float32 can decide on: the last row chosen leads the first left out by 1e-5, in float64."""
    rows = weight.double().unique(dim=0)
    assert len(rows) == num_rows
    scores = (tokens.double() @ rows.T).sort(dim=-1, descending=True).values
    if groups_per_tok == num_rows:
        return torch.ones(len(tokens), dtype=torch.bool)
    return scores[:, groups_per_tok - 1] - scores[:, groups_per_tok] > 1e-5


CASES = [(2, 8, 1), (2, 8, 3), (4, 16, 1), (4, 16, 2), (4, 8, 2), (3, 12, 2), (8, 64, 1), (8, 8, 1), (5, 35, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("granularity", "num_experts", "groups_per_tok"), CASES)
def test_every_token_visits_each_shard_equally_often(granularity, num_experts, groups_per_tok, dtype):
    router = make_router(granularity, num_experts, groups_per_tok, hidden_size=96, dtype=dtype)
    tokens = torch.randn(20_000, 96).to(dtype)
    with torch.no_grad():
        weights, index, _ = router(tokens)
    num_rows = num_experts // granularity
    sure = decided(router.weight, tokens, num_rows, groups_per_tok)
    assert sure.float().mean() > 0.999
    shard = index[sure] // num_rows
    for i in range(granularity):
        assert ((shard == i).sum(dim=-1) == groups_per_tok).all()
        # And all copies of a shard together weigh as much as those of any other.
        share = (weights[sure] * (shard == i)).sum(dim=-1)
        assert torch.allclose(share, torch.full_like(share, 1 / granularity), atol=1e-6)
    # Whole groups: an expert comes with all others of its row.
    group = index[sure] % num_rows
    for i in range(num_rows):
        assert set((group == i).sum(dim=-1).unique().tolist()) <= {0, granularity}


@pytest.mark.parametrize(("granularity", "num_experts", "groups_per_tok"), [(4, 16, 2), (3, 12, 2), (8, 64, 1)])
def test_no_way_of_breaking_ties_cuts_a_group(granularity, num_experts, groups_per_tok):
    """Backends take equal scores in orders of their own: whichever they take, each shard is there."""
    router = make_router(granularity, num_experts, groups_per_tok, hidden_size=64, dtype=torch.float32)
    num_rows, top_k = num_experts // granularity, granularity * groups_per_tok
    tokens = torch.randn(3000, 64)
    tokens = tokens[decided(router.weight, tokens, num_rows, groups_per_tok)]
    scores = (tokens.double() @ router.weight.double().T).softmax(dim=-1)
    # Rounded, so that equal rows have equal scores even where a matrix product does not sum all columns alike.
    scores = (scores * 1e9).round()
    order = torch.stack([torch.randperm(num_experts) for _ in range(len(tokens))])
    orders = {"random": order, "lowest first": torch.arange(num_experts), "highest first": -torch.arange(num_experts)}
    for name, tie_break in orders.items():
        assert (tie_break.abs() < num_experts).all()
        index = (scores * 2 * num_experts - tie_break).topk(top_k, dim=-1).indices
        counts = torch.nn.functional.one_hot(index // num_rows, granularity).sum(dim=1)
        assert (counts == groups_per_tok).all(), name


# --------------------------------------------------------------------------------------------------------------------
# Settings that make no sense


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Noise(std=0.0), "--noise-std 0.0 must be a finite number above 0."),
        (lambda: Noise(std=-1.0), "--noise-std -1.0 must be a finite number above 0."),
        (lambda: Noise(std=float("nan")), "--noise-std nan must be a finite number above 0."),
        (lambda: Noise(fraction=0.0), "--noise-fraction 0.0 must be above 0 and at most 1."),
        (lambda: Noise(fraction=1.1), "--noise-fraction 1.1 must be above 0 and at most 1."),
        (lambda: Drop(0.0), "--drop-ratio 0.0 must be above 0 and below 1; 0 is --method copy."),
        (lambda: Drop(1.0), "--drop-ratio 1.0 must be above 0 and below 1; 0 is --method copy."),
        (lambda: Drop(float("nan")), "--drop-ratio nan must be above 0 and below 1; 0 is --method copy."),
        (lambda: Granular(1), "--granularity 1 must be at least 2; whole experts are --method copy."),
        (lambda: Granular(0), "--granularity 0 must be at least 2; whole experts are --method copy."),
        (lambda: Granular(3).check(8, 3, 48), "--num-experts 8 must be a multiple of --granularity 3."),
        (lambda: Granular(3).check(9, 4, 48), "--num-experts-per-tok 4 must be a multiple of --granularity 3."),
        (
            lambda: Granular(3).check(9, 3, 50),
            "the model's intermediate_size 50 must be a multiple of --granularity 3.",
        ),
        (
            lambda: Drop(0.01).check(8, 2, 48),
            "--drop-ratio 0.01 of the model's intermediate_size 48 leaves 48 units as they are; choose one nearer 0.5.",
        ),
        (
            lambda: Drop(0.99).check(8, 2, 48),
            "--drop-ratio 0.99 of the model's intermediate_size 48 leaves 0 units as they are; choose one nearer 0.5.",
        ),
    ],
)
def test_senseless_settings_are_refused(make, sentence):
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value) == sentence
