"""Each alarm goes off when it should, once, and not for what only looks like it."""

import logging
import math
from types import SimpleNamespace

import pytest
from small import small_config
from transformers import TrainerControl, TrainerState

from moe_hf.training.telemetry.watchdog import RouterWatchdog

# A healthy entry of a model with 8 experts, 2 of them for each token, in layers 1 and 3.
HEALTHY = {
    "loss": 3.0,
    "num_tokens": 1000,
    "load_entropy/layer_1": 0.98,
    "load_entropy/layer_3": 0.95,
    "load_entropy": 0.965,
    "dead_experts/layer_1": 0,
    "dead_experts/layer_3": 0,
    "dead_experts": 0,
    "router_logit_max/layer_1": 4.0,
    "router_logit_max/layer_3": 5.0,
}
COLLAPSED = {"load_entropy/layer_3": 0.34}


class Run:
    """Log entries that a watchdog sees, 10 steps and 1000 tokens apart, and what it says to each."""

    def __init__(self, caplog, *, config: dict | None = None, is_main: bool = True, step: int = 0, **arguments) -> None:
        self._caplog = caplog
        defaults = {
            "router_collapse_threshold": 0.5,
            "router_logit_threshold": 100.0,
            "dead_expert_steps": 20,
            "stop_on_router_collapse": False,
            "freeze_router": False,
            "get_warmup_steps": lambda max_steps: 0,
        }
        self.args = SimpleNamespace(**(defaults | arguments))
        self.watchdog = RouterWatchdog(small_config(**({"num_experts": 8} | (config or {}))), self.args)
        self.state = TrainerState(global_step=step, max_steps=1000, is_world_process_zero=is_main)
        self.control = TrainerControl()
        self.watchdog.on_train_begin(self.args, self.state, self.control)
        self.num_tokens = 100 * step

    def log(self, tokens: int = 1000, **changes) -> list[str]:
        """Return the warnings that one more entry calls forth."""
        self.state.global_step += 10
        self.num_tokens += tokens
        self._caplog.clear()
        logs = HEALTHY | {"num_tokens": self.num_tokens} | changes
        self.watchdog.on_log(self.args, self.state, self.control, logs=logs)
        assert all(record.levelno == logging.WARNING for record in self._caplog.records)
        return self._caplog.messages

    @property
    def stops(self) -> bool:
        assert self.control.should_training_stop == self.control.should_save == (self.watchdog.collapsed is not None)
        return self.control.should_training_stop


@pytest.fixture
def start(caplog):
    """Begin a run by its settings."""
    return lambda **settings: Run(caplog, **settings)


def test_a_healthy_run_is_quiet(start):
    run = start(stop_on_router_collapse=True)
    assert not any(run.log() for _ in range(50)) and not run.stops


# --------------------------------------------------------------------------------------------------------------------
# Collapse


def test_collapse_is_told_once_with_the_layer_and_the_remedy(start):
    run = start()
    warnings = [run.log(**COLLAPSED) for _ in range(5)]
    message = (
        "Step 20: model.layers.3.mlp: few of 8 experts got nearly all tokens for at least 20 steps (entropy of the "
        "load 0.34 of its maximum); raise router_aux_loss_coef (now 0.05), or use router_balancing=loss_free."
    )
    assert warnings == [[], [message], [], [], []]
    assert not run.stops


def test_a_new_router_may_collapse_for_a_while(start):
    run = start(dead_expert_steps=100, stop_on_router_collapse=True)
    assert not any(run.log(**COLLAPSED) for _ in range(9))
    assert not any(run.log() for _ in range(3))
    assert not any(run.log(**COLLAPSED) for _ in range(9)) and not run.stops
    assert len(run.log(**COLLAPSED)) == 1 and run.stops


def test_one_odd_entry_is_no_collapse(start):
    """Also where one entry covers more steps than a collapse must last."""
    run = start(dead_expert_steps=1)
    for _ in range(3):
        assert run.log(**COLLAPSED) == run.log() == []


def test_a_layer_that_recovers_may_alarm_again(start):
    run = start()
    run.log(**COLLAPSED)
    assert len(run.log(**COLLAPSED)) == 1
    # A single good entry is no recovery: a load that swings about the threshold would alarm for ever.
    assert run.log() + run.log(**COLLAPSED) + run.log() + run.log(**COLLAPSED) + run.log(**COLLAPSED) == []
    assert run.log() + run.log() + run.log(**COLLAPSED) == []
    assert len(run.log(**COLLAPSED)) == 1


def test_an_entry_without_tokens_is_no_recovery(start):
    run = start()
    run.log(**COLLAPSED)
    assert len(run.log(**COLLAPSED)) == 1
    for _ in range(3):
        assert run.log(**{"load_entropy/layer_3": math.nan}) == []
    assert run.log(**COLLAPSED) + run.log(**COLLAPSED) == []


def test_threshold_is_exclusive_and_zero_switches_off(start):
    run = start()
    assert not any(run.log(**{"load_entropy/layer_1": 0.5}) for _ in range(3))
    run = start(router_collapse_threshold=0.0, stop_on_router_collapse=True)
    assert not any(run.log(**{"load_entropy/layer_1": 0.0}) for _ in range(3)) and not run.stops


def test_a_fresh_router_is_not_judged_during_warm_up(start):
    run = start(get_warmup_steps=lambda max_steps: 40)
    assert [len(run.log(**COLLAPSED)) for _ in range(7)] == [0, 0, 0, 0, 0, 1, 0]
    run = start(get_warmup_steps=lambda max_steps: 41)
    assert [len(run.log(**COLLAPSED)) for _ in range(7)] == [0, 0, 0, 0, 0, 0, 1]


def test_few_tokens_are_not_judged(start):
    """Of 39 tokens 2 assignments each are less than 10 for each of 8 experts."""
    run = start()
    assert not any(run.log(tokens=39, **COLLAPSED) for _ in range(5))
    assert [len(run.log(tokens=40, **COLLAPSED)) for _ in range(2)] == [0, 1]


def test_first_entry_of_a_resumed_run_is_not_judged(start):
    """How many tokens came before it is not known."""
    run = start(step=500)
    assert [len(run.log(**COLLAPSED)) for _ in range(4)] == [0, 0, 1, 0]


def test_collapse_is_seen_where_many_experts_are_chosen_of_few(start):
    """Half of the experts that get everything have an entropy of log 4 / log 8 = 0.667, above the threshold."""
    lowest = math.log(4) / math.log(8)
    for entropy, alarms in ((lowest, 1), (lowest + 0.09 * (1 - lowest), 1), (lowest + 0.11 * (1 - lowest), 0)):
        run = start(config={"num_experts_per_tok": 4})
        run.log(**{"load_entropy/layer_1": entropy})
        assert len(run.log(**{"load_entropy/layer_1": entropy})) == alarms


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 4)])
def test_a_load_that_cannot_be_unbalanced_cannot_collapse(start, num_experts, top_k):
    run = start(config={"num_experts": num_experts, "num_experts_per_tok": top_k})
    assert not any(run.log(**{"load_entropy/layer_1": value}) for value in (1.0, 0.99, 0.0, 0.0, math.nan))


def test_several_layers_share_one_warning(start):
    entropies = {f"load_entropy/layer_{layer}": 0.3 + layer / 1000 for layer in range(48)}
    run = start()
    run.log(**entropies)
    (message,) = run.log(**entropies)
    assert message.startswith("Step 20: model.layers.0.mlp: few of 8 experts")
    assert " (also in model.layers.1.mlp, model.layers.2.mlp, model.layers.3.mlp, 44 more); raise" in message


@pytest.mark.parametrize(
    ("config", "arguments", "remedy"),
    [
        ({"router_balancing": "loss_free"}, {}, "raise router_bias_update_speed (now 0.001), or use router_balancing="),
        ({"router_balancing": "none"}, {}, "use router_balancing=aux_loss or loss_free, not none."),
        ({}, {"freeze_router": True}, "leave freeze_router out, because"),
    ],
    ids=["loss_free", "none", "frozen"],
)
def test_remedy_fits_the_run(start, config, arguments, remedy):
    run = start(config=config, **arguments)
    run.log(**COLLAPSED)
    (message,) = run.log(**COLLAPSED)
    assert f"; {remedy}" in message


@pytest.mark.parametrize("is_main", [True, False])
def test_every_rank_stops_and_one_of_them_says_so(start, is_main):
    run = start(stop_on_router_collapse=True, is_main=is_main)
    assert run.log(**COLLAPSED) == [] and not run.stops
    assert len(run.log(**COLLAPSED)) == is_main
    assert run.stops
    assert run.watchdog.collapsed.startswith("model.layers.3.mlp: few of 8 experts got nearly all tokens")
    assert run.watchdog.collapsed.endswith("router_balancing=loss_free (step 20)")


def test_only_a_collapse_stops(start):
    run = start(stop_on_router_collapse=True, dead_expert_steps=1)
    assert len(run.log(loss=math.nan, **{"dead_experts/layer_1": 3, "router_logit_max/layer_1": 1e6})) == 3
    assert not run.stops


# --------------------------------------------------------------------------------------------------------------------
# Dead experts


def test_dead_experts_are_told_once(start):
    run = start(dead_expert_steps=30)
    dead = {"dead_experts/layer_3": 2}
    message = (
        "Step 30: model.layers.3.mlp: 2 of 8 experts got no token in the last 30 steps; "
        "raise router_aux_loss_coef (now 0.05), or use router_balancing=loss_free."
    )
    assert [run.log(**dead) for _ in range(5)] == [[], [], [message], [], []]


def test_no_expert_is_dead_before_its_time(start):
    run = start(dead_expert_steps=100)
    assert not any(run.log(**{"dead_experts/layer_1": 5}) for _ in range(9))


# --------------------------------------------------------------------------------------------------------------------
# Logits and the loss


def test_exploding_logits_name_the_worst_layer(start):
    run = start()
    logits = {"router_logit_max/layer_1": 100.1, "router_logit_max/layer_3": 345.678}
    message = (
        "Step 10: model.layers.3.mlp: a router logit has reached 345.7, beyond router_logit_threshold=100 "
        "(also in model.layers.1.mlp); raise router_z_loss_coef (now 0.02), or lower learning_rate."
    )
    assert [run.log(**logits) for _ in range(3)] == [[message], [], []]
    assert len(start().log(**{"router_logit_max/layer_1": math.inf})) == 1


def test_large_logits_are_allowed_up_to_the_threshold(start):
    assert start().log(**{"router_logit_max/layer_1": 100.0}) == []
    assert start(router_logit_threshold=0.0).log(**{"router_logit_max/layer_1": 1e9}) == []


@pytest.mark.parametrize(("loss", "word"), [(math.nan, "nan"), (math.inf, "inf")])
def test_a_loss_that_is_not_finite_is_told_at_once(start, loss, word):
    run = start()
    message = f"Step 10: the loss is {word}; lower learning_rate, or look at the data."
    assert [run.log(loss=loss) for _ in range(3)] == [[message], [], []]
    assert [run.log(loss=1.0), run.log(loss=1.0), len(run.log(loss=loss))] == [[], [], 1]


def test_a_large_loss_is_finite(start):
    assert start().log(loss=1e30) == []


# --------------------------------------------------------------------------------------------------------------------
# Other entries


def test_evaluations_and_the_end_of_training_are_not_judged(start):
    run = start(stop_on_router_collapse=True)
    for logs in ({"eval_loss": math.nan} | COLLAPSED, {"train_loss": math.nan}, {}, None):
        for _ in range(3):
            run.watchdog.on_log(run.args, run.state, run.control, logs=logs)
    assert not run.stops and not run.log()


def test_a_dense_model_has_only_its_loss(start):
    run = start(config={"num_experts": 0, "shared_expert_intermediate_size": 0, "shared_expert_gate": False})
    run.watchdog.on_log(run.args, run.state, run.control, logs={"loss": 1.0})
    assert not run.stops
