"""Starting from other weights: flow-matching checkpoints, other classes, missing keys; and everything that is refused."""

import pytest
import torch
from helpers.commands import command
from helpers.networks import TINY, load_golden, randomize
from safetensors.torch import load_file, save_file

from tim.checkpoint.warm_start import LABELS, warm_start
from tim.models.c2i.tim_model import TiM

FLOW = ["delta_embedder.*", "blocks.*.attn.qkv_d.*"]


def flow_weights(state):
    """What a flow-matching checkpoint of the same trunk holds."""
    return {k: v for k, v in state.items() if "delta_embedder" not in k and "qkv_d" not in k}


def flow(name, meta, state):
    """(network, F_old(x, t, y)): the same trunk without interval, in float64."""
    kinds = {"c2i_tiny": "tim.models.c2i.tim_model", "t2i_tiny": "tim.models.t2i.tim_model"}
    cls = __import__(kinds[name], fromlist=["TiM"]).TiM
    old = cls(**{**meta["network"], "use_new_embed": False, "distance_aware": False}).double()
    old.load_state_dict({k: v.double() for k, v in state.items()}, strict=True)

    old.interval_embedding = lambda t, r: torch.zeros(len(t), 1, dtype=torch.float64)

    def f_old(x, t, y):
        return old(x, t, t, y)

    return cls, f_old


@pytest.mark.parametrize("condition", ["t-r", "r"])
@pytest.mark.parametrize("name", ["c2i_tiny", "t2i_tiny"])
def test_a_flow_matching_checkpoint_keeps_its_flow(name, condition):
    """F_new(x, t, r) = F_old(x, t) to 1e-12 in float64, for r = t and every other r, and training leaves that start."""
    meta, _, trained = load_golden(name)
    state = flow_weights(trained.state_dict())
    cls, f_old = flow(name, meta, state)
    network = cls(**{**meta["network"], "new_condition": condition}).double()
    (note,) = warm_start(network, state, "flow.pt", FLOW)
    assert "no delta_embedder" in note
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, network.in_channels, 8, 8, generator=g, dtype=torch.float64)
    t = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    y = torch.tensor([1, 4, 10]) if name == "c2i_tiny" else torch.randn(3, 5, network.cap_feat_dim, generator=g).double()
    want = f_old(x, t, y)
    for r in (t, t / 3, torch.zeros_like(t)):
        assert (network(x, t, r, y) - want).abs().max() <= 1e-12 * want.abs().max()
    assert want.std() > 0.01

    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        (network(x, t, t / 3, y) - x).square().mean().backward()
        moving = {k for k, p in network.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert "delta_embedder.mlp.2.weight" in moving and "delta_embedder.mlp.2.bias" in moving
        optimizer.step()
    interval = {k for k in network.state_dict() if "delta_embedder" in k or "qkv_d" in k}
    assert len(interval) == 4 + meta["network"]["depth"] and interval <= moving
    assert (network(x, t, t / 3, y) - network(x, t, t, y)).abs().max() > 1e-9


def test_interval_aware_attention_can_be_added_to_a_trained_interval(tiny_c2i):
    plain = randomize(TiM(num_classes=10, **{**TINY, "distance_aware": False})).double()
    network = TiM(num_classes=10, **TINY).double()
    (note,) = warm_start(network, plain.state_dict(), "plain.pt", ["*.qkv_d.weight"])
    x, t, y = torch.randn(2, 4, 8, 8).double(), torch.tensor([0.9, 0.4]).double(), torch.tensor([0, 3])
    assert torch.equal(network(x, t, t / 2, y), plain(x, t, t / 2, y)) and "qkv_d starts at zero" in note


@pytest.mark.parametrize("classes", [3, 25])
def test_another_number_of_classes_keeps_the_null_class(tiny_c2i, classes):
    torch.manual_seed(5)
    network = TiM(num_classes=classes, **TINY)
    own = network.y_embedder.embedding_table.weight.detach().clone()
    (note,) = warm_start(network, tiny_c2i.state_dict(), "ten.pt")
    assert "11 rows" in note and f"all {classes} classes" in note
    table, null = network.y_embedder.embedding_table.weight, tiny_c2i.y_embedder.embedding_table.weight[10]
    assert table.shape == (classes + 1, 48) and torch.equal(table[classes], null)
    torch.testing.assert_close(table[:classes] - null, own[:classes], atol=1e-6, rtol=0)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.9, 0.4])
    new = network(x, t, t / 2, torch.full((2,), classes))
    assert torch.equal(new, tiny_c2i(x, t, t / 2, torch.full((2,), 10))), "the unconditional network is the file's"


def test_without_a_null_class_all_rows_are_classes(tiny_c2i):
    network = TiM(num_classes=4, class_dropout_prob=0.0, **TINY)
    warm_start(network, tiny_c2i.state_dict(), "ten.pt")
    rows, null = network.y_embedder.embedding_table.weight, tiny_c2i.y_embedder.embedding_table.weight[10]
    assert rows.shape == (4, 48) and (rows - null).std().item() == pytest.approx(0.02, rel=0.2)


def test_allowed_keys_start_fresh_and_are_named(tiny_c2i):
    network = TiM(num_classes=10, **TINY)
    fresh = network.projector[0].weight.detach().clone()
    state = {k: v for k, v in tiny_c2i.state_dict().items() if not k.startswith("projector.")}
    (note,) = warm_start(network, state, "w.pt", ["projector.*"])
    assert "lacks 6 keys" in note and "projector.0.weight" in note
    assert torch.equal(network.projector[0].weight, fresh)
    assert torch.equal(network.blocks[1].mlp.fc2.weight, tiny_c2i.blocks[1].mlp.fc2.weight)
    assert warm_start(network, tiny_c2i.state_dict(), "w.pt", ["projector.*"]) == [], "nothing is missing, nothing is said"


def test_a_run_without_repa_needs_no_projector(tiny_c2i):
    state = {k: v for k, v in tiny_c2i.state_dict().items() if not k.startswith("projector.")}
    network = TiM(num_classes=10, **TINY)
    with pytest.raises(ValueError, match=r"no projector.*model\.ckpt_allow_missing=\[projector\.\*\]"):
        warm_start(network, state, "w.pt")
    network.projector.requires_grad_(False)
    assert warm_start(network, {f"module._orig_mod.{k}": v for k, v in state.items()}, "w.pt") == []
    assert torch.equal(network.blocks[1].mlp.fc2.weight, tiny_c2i.blocks[1].mlp.fc2.weight)


def test_what_does_not_fit_is_refused_and_nothing_is_loaded(tiny_c2i):
    state = tiny_c2i.state_dict()
    without_delta = {k: v for k, v in state.items() if "delta_embedder" not in k}
    part = {k: v for k, v in state.items() if k != "delta_embedder.mlp.0.weight"}
    cases = [
        (flow_weights(state), [], {}, "delta_embedder.mlp.0.weight.*model.ckpt_allow_missing"),
        (state, ["projektor.*"], {}, "no key that matches 'projektor"),
        ({**state, "extra": torch.zeros(1)}, [], {}, "unknown keys.*extra"),
        ({**state, LABELS: torch.zeros(11, 7)}, [], {}, "embedding_table.weight: file \\(11, 7\\)"),
        (without_delta, FLOW, {}, "use_new_embed=false"),
        (part, FLOW, {}, "a part of delta_embedder"),
        (flow_weights(state), FLOW, {"new_condition": "t,t-r"}, "new_condition='t,t-r'"),
    ]
    for weights, allowed, changes, message in cases:
        network = TiM(num_classes=10, **{**TINY, **changes})
        before = {k: v.clone() for k, v in network.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            warm_start(network, weights, "w.pt", allowed)
        assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_the_trainer_starts_from_a_project_and_from_a_flow(tmp_path):
    """model.ckpt names a project of ten classes for a run of twelve; then a flow-matching file."""
    trainer = [
        "projects/train/trainer_c2i.py", "--config", "configs/c2i/digits.yaml", "training.sample_steps=null",
        "data.dataloader.batch_size=16", "model.network.params.hidden_size=24", "model.network.params.depth=1",
    ]  # fmt: skip
    command(*trainer, "--project_dir", tmp_path / "first", "training.max_train_steps=2")
    first = load_file(tmp_path / "first" / "checkpoints" / "step-0000002" / "ema.safetensors")

    still = [*trainer, "training.max_train_steps=1", "training.learning_rate=1e-30"]  # the weights stay where they start
    more = ["model.network.params.num_classes=12", f"model.ckpt={tmp_path}/first"]
    done = command(*still, "--project_dir", tmp_path / "second", *more)
    assert "label table of 11 rows" in done.stderr and "kept here as row 12" in done.stderr
    second = load_file(tmp_path / "second" / "checkpoints" / "step-0000001" / "model.safetensors")
    assert torch.equal(second.pop(LABELS)[12], first[LABELS][10])
    assert all(torch.equal(second[k], first[k]) for k in second)

    save_file(flow_weights(first), tmp_path / "flow.safetensors")
    start = [f"model.ckpt={tmp_path}/flow.safetensors", f"model.ckpt_allow_missing={FLOW}".replace("'", "")]
    done = command(*still, "--project_dir", tmp_path / "third", *start)
    assert "starting as its flow" in done.stderr
    third = load_file(tmp_path / "third" / "checkpoints" / "step-0000001" / "model.safetensors")
    assert third["delta_embedder.mlp.2.weight"].abs().max() < 1e-20 and torch.equal(third[LABELS], first[LABELS])
    done = command(*still, "--project_dir", tmp_path / "fourth", start[0], check=False)
    assert done.returncode == 2 and "model.ckpt_allow_missing" in done.stderr and not (tmp_path / "fourth").exists()
