"""Plans, the training graph, and what METHOD section 4 says must hold."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdsurgeon.distillation import prepare
from kdsurgeon.errors import DataError, PlanError, TraceError, UsageError
from kdsurgeon.losses import block_kd_loss
from kdsurgeon.partitioning import recut
from kdsurgeon.recipe import Recipe
from kdsurgeon.runs import Run
from kdsurgeon.stones import (
    Plan,
    certify,
    compose,
    fit_adapters,
    forecast,
    partition,
    plan_stones,
    read_plan,
    synthesize,
    within_budget,
)
from kdsurgeon.tracing import trace
from tests import models

PAIRS = [
    ("residual", "residual"),
    ("residual", "inverted"),
    ("chain", "chain"),
    ("dense", "residual"),
    ("residual", "dense"),
    ("branching", "branching"),
    ("inverted", "shuffle"),
    ("shared", "shared"),
    ("tokens", "tokens"),
    ("residual", "tokens"),
    ("tokens", "residual"),
    ("streams", "streams"),
    ("streams", "chain"),
    ("dense", "streams"),
]
DROPS = {"tokens": {"dropout": 0.2}}  # as vision transformers are trained


def planned(teacher="residual", student="inverted", *, dtype=torch.float32, **kwargs):
    first = models.make(teacher, seed=1, **DROPS.get(teacher, {})).to(dtype)
    second = models.make(student, seed=2, **DROPS.get(student, {})).to(dtype)
    return partition(first, second, models.images(2, dtype=dtype), **kwargs)


def with_identity_adapters(plan: Plan) -> Plan:
    stones = tuple(
        replace(
            stone, adapters=tuple(replace(spec, operation="identity") for spec in stone.adapters)
        )
        for stone in plan.stones
    )
    return Plan(plan.alignment, stones)


def assert_no_gap(proof):
    assert proof.teacher_evaluation == proof.teacher_training == 0.0
    assert proof.student_evaluation == proof.student_training == 0.0
    assert proof.splice == 0.0


# METHOD 4 ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", models.ALL)
def test_4_1_a_copy_of_the_teacher_with_identity_adapters_gives_the_teachers_logits(name):
    teacher = models.make(name, **DROPS.get(name, {}))
    plan = with_identity_adapters(partition(teacher, copy.deepcopy(teacher), models.images(2)))
    # a larger batch may round otherwise, and so do folded weights
    bounds = {(False, False): 0.0, (True, False): 1e-6, (False, True): 1e-5, (True, True): 1e-5}
    for (merge, fold), bound in bounds.items():
        logits = synthesize(plan, merge=merge, fold=fold).eval()(models.images(5))
        assert len(logits.stones) == len(plan.stones) > 0
        for each in (logits.student, *logits.stones):
            torch.testing.assert_close(each, logits.teacher, rtol=bound, atol=bound)
        loss = block_kd_loss(logits, models.labels(5), ce_weight=0.0, cross_weight=1.0)
        assert set(loss.parts) >= {"kd student", "kd stone 1", "cross student", "cross stone 1"}
        assert all(part.item() == pytest.approx(0.0, abs=1e-6) for part in loss.parts.values())


def owners(whole):
    """The block of every parameter of a model: the first that uses it."""
    found = {}
    for index, block in enumerate(whole.blocks):
        for node in block.nodes:
            if node.op == "call_module":
                for parameter in whole.trace.model.get_submodule(node.target).parameters():
                    found.setdefault(parameter, index)
            elif node.op == "get_attr":
                found.setdefault(whole.trace.model.get_parameter(node.target), index)
    return found


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_4_2_a_stone_reaches_the_student_up_to_its_boundary_and_no_further(teacher, student, fold):
    for stone in planned(teacher, student).stones:
        plan = planned(teacher, student)
        stones = synthesize(plan, fold=fold)
        logits = stones(models.images(4))
        logits.stones[stone.depth - 1].square().sum().backward()
        owner = owners(plan.student)
        assert set(owner) == set(plan.student.trace.model.parameters())
        reached = {
            index: any(p.grad is not None and p.grad.abs().sum() > 0 for p in own)
            for index in range(len(plan.student.blocks))
            if (own := [p for p, i in owner.items() if i == index])
        }
        assert reached == {index: index < stone.depth for index in reached}
        for depth, adapters in stones.adapters.items():
            for adapter in adapters:  # a wide cut has one for each of its tensors
                reaches = any(p.grad is not None and p.grad.any() for p in adapter.parameters())
                assert reaches == (int(depth) == stone.depth)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_4_3_the_teacher_is_bit_identical_after_training_whatever_mode_the_caller_sets(
    teacher, student, fold
):
    plan = planned(teacher, student)
    own = plan.teacher.trace.model
    own.train()
    before = copy.deepcopy(own.state_dict())
    stones = synthesize(plan, fold=fold)
    optimizer = torch.optim.SGD(stones.parameters(), lr=0.1)
    for step in range(3):
        stones.train(step != 1)
        block_kd_loss(stones(models.images(6, seed=step)), models.labels(6)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(value, before[key]) for key, value in own.state_dict().items())
    assert all(parameter.grad is None for parameter in own.parameters())
    assert all(parameter.requires_grad for parameter in own.parameters())
    assert own.training


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_4_4_merged_and_looped_tails_agree_in_logits_and_gradients(teacher, student, fold):
    results = []
    for merge in (True, False):
        plan = planned(teacher, student, dtype=torch.float64)
        stones = synthesize(plan, merge=merge, fold=fold)
        torch.manual_seed(3)  # of the student's dropout
        logits = stones(models.images(5, dtype=torch.float64))
        block_kd_loss(logits, models.labels(5), cross_weight=1.0).total.backward()
        results.append((logits.stones, [p.grad for p in stones.parameters()]))
    (merged, merged_grads), (looped, looped_grads) = results
    torch.testing.assert_close(merged, looped, rtol=0, atol=1e-10)
    for one, other in zip(merged_grads, looped_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_4_5_the_blocks_of_a_plan_recomposed_are_its_models(teacher, student, training):
    """At the cuts of a plan; test_partitioning.py has it at every cut there is."""
    plan, twins = planned(teacher, student), planned(teacher, student)
    for whole, twin in ((plan.teacher, twins.teacher), (plan.student, twins.student)):
        model = whole.trace.model.train(training)
        captured = trace(twin.trace.model.train(training), models.images(2), training=training)
        assert len(twin.blocks) == len(plan.stones) + 1 > 1
        outputs = []
        for network in (model, compose(recut(twin, captured))):
            torch.manual_seed(3)
            outputs.append(network(models.images(5)))
            outputs[-1].square().mean().backward()
        assert torch.equal(*outputs)
        for own, other in zip(model.parameters(), twin.trace.model.parameters(), strict=True):
            assert torch.equal(own.grad, other.grad)
        for own, other in zip(model.buffers(), twin.trace.model.buffers(), strict=True):
            assert torch.equal(own, other)


def trained(plan: Plan, recipe: Recipe, **kwargs: object) -> list[dict[str, float]]:
    """The losses of every step of a run over two batches, the stones' own left out."""
    sides = (plan.teacher, plan.student)
    batches = [(models.images(6, seed=i), models.labels(6, seed=i)) for i in range(2)]
    ready = prepare(*(side.trace.model for side in sides), batches, plan=plan, recipe=recipe)
    losses = []
    torch.manual_seed(3)
    for _ in ready.epochs(watch=lambda step: losses.append(step.losses), **kwargs):
        pass
    return [{k: v for k, v in step.items() if "stone" not in k} for step in losses]


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_4_6_stones_that_weigh_nothing_change_no_bit_of_plain_distillation(teacher, student):
    """Neither where they are left out, nor where they are asked for by depth and run."""
    results = []
    for method, wanted in (("kd", "all"), ("block-kd", "all"), ("block-kd", "each")):
        plan = planned(teacher, student)
        plan = replace(plan, stones=tuple(replace(stone, weight=0.0) for stone in plan.stones))
        depths = [stone.depth for stone in plan.stones] if wanted == "each" else wanted
        loss = {"cross_weight": 0.0, "stones": depths}
        losses = trained(plan, Recipe(method=method, epochs=2, loss=loss))
        results.append((losses, plan.student.trace.model.state_dict()))
    (plain, plain_weights), *others = results
    assert len(plain) == 4 and set(plain[0]) == {"total", "ce student", "kd student"}
    for losses, weights in others:
        assert losses == plain
        assert all(torch.equal(value, plain_weights[key]) for key, value in weights.items())


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_4_7_the_saved_student_is_an_untouched_student_and_nothing_else(teacher, student, tmp_path):
    plan = planned(teacher, student)
    with Run.create(tmp_path / "run") as run:
        trained(plan, Recipe(epochs=1), run=run)
    saved = load_file(tmp_path / "run" / "student" / "last.safetensors")
    untouched = models.make(student, seed=5)
    assert set(saved) == set(untouched.state_dict())
    untouched.load_state_dict(saved, strict=True)
    after = plan.student.trace.model.eval()
    assert torch.equal(untouched.eval()(models.images()), after(models.images()))
    before = models.make(student, seed=2).state_dict()
    assert any(not torch.equal(value, before[key]) for key, value in saved.items())


def test_two_streams_of_one_network_are_cut_by_twos_at_every_stage():
    for teacher, student in (("streams", "streams"), ("streams", "chain"), ("dense", "streams")):
        plan = planned(teacher, student)
        for name, whole in ((teacher, plan.teacher), (student, plan.student)):
            assert {point.width for point in whole.cuts} == {2 if name == "streams" else 1}
        assert_no_gap(certify(plan))


# the training graph ──────────────────────────────────────────────────────────────────────────────


def test_the_student_runs_once_and_its_statistics_move_once():
    plan = planned("residual", "residual")
    student = plan.student.trace.model
    stones = synthesize(plan)
    stones(models.images(4))
    counts = [
        m.num_batches_tracked.item() for m in student.modules() if isinstance(m, nn.BatchNorm2d)
    ]
    assert counts == [1] * len(counts)


@pytest.mark.parametrize("training", [True, False])
def test_the_students_logits_are_those_of_the_untouched_student(training):
    plan = planned("residual", "residual")
    untouched = models.make("residual", seed=2).train(training)
    logits = synthesize(plan).train(training)(models.images(4))
    assert torch.equal(logits.student, untouched(models.images(4)))


def test_the_teachers_logits_are_those_of_the_untouched_teacher_in_eval_mode():
    logits = synthesize(planned(), fold=False)(models.images(4))
    assert torch.equal(logits.teacher, models.make("residual", seed=1).eval()(models.images(4)))
    assert not logits.teacher.requires_grad


def test_only_student_and_adapters_are_trained():
    plan = planned()
    stones = synthesize(plan)
    names = {name.split(".")[0] for name, _ in stones.named_parameters()}
    assert names == {"student", "adapters"}
    assert stones.student is plan.student.trace.model


def test_dropout_of_the_teacher_is_off_and_that_of_the_student_on():
    teacher = models.make("residual", seed=1, dropout=0.5)
    student = models.make("residual", seed=2, dropout=0.5)
    stones = synthesize(partition(teacher, student, models.images(2)), seed=1)
    first, second = stones(models.images(4)), stones(models.images(4))
    assert torch.equal(first.teacher, second.teacher)
    assert not torch.equal(first.student, second.student)


def test_hooks_of_the_callers_teacher_do_not_fire_in_the_tails():
    teacher = models.make("residual", seed=1)
    calls = []
    teacher.head.register_forward_hook(lambda *_: calls.append(1))
    synthesize(partition(teacher, models.make("inverted"), models.images(2)))(models.images(4))
    assert calls == []


def test_double_precision_moves_student_adapters_and_teacher_but_not_the_callers_teacher():
    plan = planned()
    stones = synthesize(plan).double()
    logits = stones(models.images(4, dtype=torch.float64))
    assert logits.stones.dtype == logits.teacher.dtype == torch.float64
    assert next(plan.teacher.trace.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("depths", [(), (3,), (1, 3), (1, 2, 3)])
def test_only_the_stones_asked_for_are_built(depths):
    stones = synthesize(planned(), depths=depths)
    logits = stones(models.images(4))
    assert logits.depths == depths
    assert logits.stones.shape == (len(depths), 4, models.CLASSES)
    assert set(stones.adapters) == set(map(str, depths))


def test_a_stone_does_not_depend_on_which_others_are_built():
    alone = synthesize(planned(), depths=(2,)).eval()(models.images(4)).stones[0]
    together = synthesize(planned()).eval()(models.images(4)).stones[1]
    torch.testing.assert_close(alone, together)


def test_a_stone_that_the_plan_lacks_is_refused():
    with pytest.raises(PlanError, match="no stone of depth 7"):
        synthesize(planned(), depths=(7,))


def test_a_stone_that_was_not_built_is_refused_with_those_that_were():
    stones = synthesize(planned(), depths=(1,))
    with pytest.raises(UsageError, match="there is no stone of depth 2") as caught:
        stones(models.images(2), depths=(1, 2))
    assert caught.value.notes["known"] == "1"


class Words(nn.Module):
    """Token ids in; places are added before every layer, for as many samples as there are ids.

    Where it is ``masked``, the ids say after every layer which tokens count.
    """

    def __init__(self, width, *, masked=False):
        super().__init__()
        self.masked = masked
        self.embedding = nn.Embedding(20, width)
        self.place = nn.Parameter(torch.randn(1, 6, width))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, models.CLASSES)

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x + self.place.expand(len(ids), -1, -1)).relu()
            x = x * (ids > 0)[..., None] if self.masked else x
        return self.head(x.mean(1))


def test_tails_that_read_the_number_of_samples_from_the_ids_can_be_merged():
    ids = torch.arange(30).view(5, 6) % 20
    plan = partition(Words(16), Words(8), ids[:2])
    merged, looped = (synthesize(plan, merge=merge)(ids).stones for merge in (True, False))
    assert merged.shape == (3, 5, models.CLASSES)
    torch.testing.assert_close(merged, looped)


def test_tails_that_read_a_mask_of_the_ids_are_looped():
    ids = torch.arange(30).view(5, 6) % 20
    plan = partition(Words(16, masked=True), Words(8, masked=True), ids[:2])
    with pytest.raises(PlanError, match="cannot be merged") as caught:
        synthesize(plan, merge=True)
    assert caught.value.notes["where"] == "mul_1"  # the first behind a boundary
    assert synthesize(plan)(ids).stones.shape == (3, 5, models.CLASSES)


def test_a_teacher_that_mixes_samples_is_looped_and_never_merged():
    teacher = models.make("chain", seed=1)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = None
    plan = partition(teacher, models.make("chain"), models.images(2))
    with pytest.raises(PlanError, match="cannot be merged") as caught:
        synthesize(plan, merge=True)
    assert caught.value.notes["where"] == "5"
    both = [synthesize(plan, merge=m).eval()(models.images(4)).stones for m in (None, False)]
    assert torch.equal(*both)


def test_two_syntheses_share_the_student_and_nothing_else():
    plan = planned()
    first, second = synthesize(plan, seed=0), synthesize(plan, seed=1)
    assert first.student is second.student
    assert not torch.equal(*(next(stones.adapters["1"].parameters()) for stones in (first, second)))


# forecast and certificate ────────────────────────────────────────────────────────────────────────


def test_the_forecast_is_the_formula():
    plan = planned("residual", "residual")
    teacher, student = plan.teacher, plan.student
    plain = teacher.cost.multiply_adds + 3 * student.cost.multiply_adds
    assert forecast(plan, ()).with_stones == forecast(plan).distillation == plain
    last = forecast(plan, (3,)).with_stones - plain
    head = teacher.blocks[-1].cost.multiply_adds
    adapter = 32 * 32 * 4 * 4
    assert last == 2 * head + 3 * adapter


def test_the_forecast_of_time_adds_the_memory_that_is_moved():
    plan = planned("residual", "residual")
    teacher, student = plan.teacher.cost, plan.student.cost

    def memory(teacher_times: int, student_times: int, batch: int) -> float:
        moved = teacher_times * teacher.activation_bytes + student_times * student.activation_bytes
        read = teacher_times * teacher.parameters + student_times * student.parameters
        return 12 * moved + 64 * read / batch

    plain = forecast(plan, (), batch=8)
    assert plain.distillation_time == plain.with_stones_time
    assert plain.distillation_time == plain.distillation + memory(1, 3, 8)
    assert plain.time_ratio == 1.0


def test_merged_tails_read_their_weights_once():
    plan = planned("residual", "residual")
    adapters = sum(forecast(plan, (depth,)).adapter_parameters for depth in (1, 2, 3))
    longest = sum(block.cost.parameters for block in plan.teacher.blocks[1:])
    one, two = (forecast(plan, batch=batch) for batch in (1, 2))
    read = one.with_stones_time - one.distillation_time
    assert 2 * (read - (two.with_stones_time - two.distillation_time)) == pytest.approx(
        64 * (2 * longest + 3 * adapters)
    )


def test_the_counted_multiply_adds_of_a_step_are_the_forecast():
    from torch.utils.flop_counter import FlopCounterMode

    plan = planned("residual", "residual")
    stones = synthesize(plan)
    images = models.images(2)
    with FlopCounterMode(display=False) as counter:
        logits = stones(images)
        (logits.student.sum() + logits.stones.sum()).backward()
    first_layer = next(iter(plan.student.trace.model.stem))
    without_input_gradient = 16 * 16 * first_layer.weight.numel()
    counted = counter.get_total_flops() / 2 / len(images)
    assert counted == forecast(plan).with_stones - without_input_gradient


def test_a_right_surgery_is_certified_with_no_gap():
    proof = certify(planned())
    assert_no_gap(proof)
    assert proof.merged < 1e-5


def test_certifying_leaves_both_models_as_they_were():
    plan = planned()
    models_before = [
        copy.deepcopy(w.trace.model.state_dict()) for w in (plan.teacher, plan.student)
    ]
    certify(plan)
    for whole, before in zip((plan.teacher, plan.student), models_before, strict=True):
        state = whole.trace.model.state_dict()
        assert all(torch.equal(state[key], before[key]) for key in state)


# plan.yaml ───────────────────────────────────────────────────────────────────────────────────────


def traces(plan):
    return plan.teacher.trace, plan.student.trace


def test_a_plan_is_written_and_read_back_as_the_same_bytes(tmp_path):
    plan = planned()
    plan.save(tmp_path / "plan.yaml")
    again = read_plan(tmp_path / "plan.yaml", *traces(plan))
    assert again.to_yaml() == plan.to_yaml()
    assert again.hash == plan.hash
    assert [file.name for file in tmp_path.iterdir()] == ["plan.yaml"]


def test_a_plan_edited_by_hand_is_followed(tmp_path):
    plan = planned("residual", "residual")
    text = plan.to_yaml().replace("weight: 0.25", "weight: 0.75")
    path = tmp_path / "plan.yaml"
    path.write_text(text.replace("teacher: layers.0.relu_1", "teacher: layers.0.add"))
    edited = read_plan(path, *traces(plan))
    assert edited.stones[0].weight == 0.75
    assert edited.alignment.boundaries[0].teacher.name == "layers.0.add"
    assert not edited.stones[0].adapters[0].target.is_rectified


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("teacher: layers.1.relu_1", "teacher: layers.1.relo_1", "no node layers.1.relo_1"),
        ("teacher: layers.1.relu_1", "teacher: layers.1.conv1", "cannot be cut at layers.1.conv1"),
        ("teacher: layers.0.relu_1", "teacher: layers.2.relu_1", "is given twice"),
        ("weight: 0.25", "weight: -1.0", "weight of boundary 1 is -1.0"),
        ("weight: 0.25", "weight: .nan", "weight of boundary 1 is nan"),
        ("weight: 0.25", "weight: yes", "weight of boundary 1 is 'yes'"),
        ("adapter: conv", "adapter: convv", 'no adapter is called "convv"'),
        ("adapter: conv", "adapter: upsample", "upsample cannot carry"),
        ("plan: 2", "plan: 1", "version 1"),
        ("boundaries:", "boundary:", "is not a plan"),
        ("    weight: 0.25", "    wait: 0.25", "boundary 1 must name teacher and student"),
    ],
)
def test_a_wrong_edit_is_refused_with_its_place(tmp_path, old, new, message):
    plan = planned("residual", "residual")
    assert old in plan.to_yaml()
    path = tmp_path / "plan.yaml"
    path.write_text(plan.to_yaml().replace(old, new, 1))
    with pytest.raises(PlanError, match=message) as caught:
        read_plan(path, *traces(plan))
    assert caught.value.exit_code == 2


def test_a_plan_for_other_models_is_refused(tmp_path):
    plan = planned("residual", "residual")
    plan.save(tmp_path / "plan.yaml")
    other = trace(models.make("chain"), models.images(2), name="other.pt")
    with pytest.raises(PlanError, match=r"made for another student than other\.pt"):
        read_plan(tmp_path / "plan.yaml", plan.teacher.trace, other)


def test_planning_is_the_same_in_every_process():
    import subprocess
    import sys

    script = (
        "from tests import models; from kdsurgeon.stones import partition;"
        "print(partition(models.make('residual'), models.make('inverted'), models.images(2)).hash)"
    )
    other = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == planned().hash


def test_a_plan_without_boundaries_is_plain_distillation():
    plan = planned(blocks=0)
    assert plan.stones == ()
    assert synthesize(plan)(models.images(3)).stones.shape == (0, 3, 10)
    assert plan_stones(plan.alignment) == plan


def test_a_student_that_writes_in_place_trains_like_one_that_does_not():
    from tests.test_tracing import WritesInPlace

    plan = partition(models.make("chain"), WritesInPlace(), models.images(2), blocks=1)
    proof = certify(plan)
    assert_no_gap(proof)
    logits = synthesize(plan)(models.images(4))
    block_kd_loss(logits, models.labels(4)).total.backward()
    student = plan.student.trace.model
    assert torch.equal(logits.student, student(models.images(4)))
    assert all(parameter.grad is not None for parameter in student.parameters())


# least squares ───────────────────────────────────────────────────────────────────────────────────


def test_fitted_adapters_bring_the_stones_nearer_to_the_teacher_and_change_nothing_else():
    plan = planned("residual", "residual")
    stones = synthesize(plan)
    student = plan.student.trace.model
    before = copy.deepcopy(student.state_dict())
    batches = [models.images(32, seed=seed) for seed in range(1, 9)]

    def distances():
        with torch.no_grad():
            logits = stones.train()(models.images(64, seed=99))
        return [(stone - logits.teacher).square().mean().item() for stone in logits.stones]

    at_random = distances()
    student.load_state_dict(before)
    shares = fit_adapters(stones, plan, batches)
    assert set(shares) == {1, 2, 3}
    assert all(0.02 < share <= 1 for group in shares.values() for share in group)
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert all(fitted < drawn for fitted, drawn in zip(distances(), at_random, strict=True))


def test_least_squares_is_a_field_of_the_recipe():
    from kdsurgeon import Recipe
    from kdsurgeon.distillation import prepare

    batches = [(models.images(32, seed=seed), models.labels(32)) for seed in range(2)]
    weights = {}
    for init in ("default", "least-squares"):
        teacher, student = models.make("residual", seed=1), models.make("inverted", seed=2)
        recipe = Recipe(loss={"adapter_init": init})
        ready = prepare(teacher, student, batches, recipe=recipe)
        weights[init] = [weight.detach().clone() for weight in ready.model.adapters.parameters()]
    assert not all(map(torch.equal, *weights.values()))


def test_no_sample_to_fit_on_is_refused():
    plan = planned()
    with pytest.raises(DataError, match="no sample to fit the adapters on"):
        fit_adapters(synthesize(plan), plan, [])


# budgets ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_budget_keeps_the_deepest_stones_that_fit():
    plan = planned("residual", "residual")
    everything = forecast(plan).time_ratio
    assert within_budget(plan, everything) == (1, 2, 3)
    for depths in ((3,), (2, 3)):
        ratio = forecast(plan, depths).time_ratio
        assert within_budget(plan, ratio + 1e-6) == depths
    with pytest.raises(PlanError, match="no stone fits a budget of 1 ×") as caught:
        within_budget(plan, 1.0)
    assert "--method kd" in caught.value.notes["fix"]


def test_the_forecast_of_memory_counts_what_the_backward_pass_keeps():
    plan = planned("residual", "residual")
    whole = forecast(plan)
    assert forecast(plan, ()).with_stones_bytes == whole.distillation_bytes
    sizes = [forecast(plan, (depth,)).with_stones_bytes for depth in (1, 2, 3)]
    assert sizes == sorted(sizes, reverse=True)  # an earlier stone has the longer tail
    assert whole.memory_ratio > 1


# models of every habit ───────────────────────────────────────────────────────────────────────────


def test_a_frozen_teacher_is_certified():
    teacher = models.make("residual", seed=1).requires_grad_(False)
    plan = partition(teacher, models.make("residual", seed=2), models.images(2))
    assert certify(plan).stones == 3


class Auxiliary(nn.Module):
    """GoogLeNet and its like: a second head, for training only, on an early tensor."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(*models.conv(3, 8, stride=2))
        self.second = nn.Sequential(*models.conv(8, 8, stride=2))
        self.auxiliary = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(512, 10))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        early = self.first(x)
        logits = self.head(self.second(early).mean((2, 3)))
        return (logits, self.auxiliary(early)) if self.training else logits


def test_a_head_for_training_only_pins_no_layer():
    plan = partition(models.make("residual"), Auxiliary(), models.images(2))
    assert len(plan.stones) == 2
    assert_no_gap(certify(plan))


class MovesAnAverage(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.head = nn.Linear(8, 10)
        self.register_buffer("average", torch.zeros(()))

    def forward(self, x):
        x = self.conv(x).relu()
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.mean()
        return self.head(x.mean((2, 3)) - self.average)


def test_a_model_that_replaces_its_buffers_is_refused_by_their_name_and_left_as_it_was():
    student = MovesAnAverage()
    average = student.average
    plan = partition(models.make("residual"), student, models.images(2))
    with pytest.raises(TraceError, match="into the place of its buffer average"):
        certify(plan)
    assert student.average is average


def test_plain_distillation_calls_the_student_as_it_is_and_its_buffers_move():
    student = MovesAnAverage()
    plan = partition(models.make("residual"), student, models.images(2), blocks=0)
    synthesize(plan)(models.images(4))
    assert student.average.item() != 0.0


class CountsItsSteps(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head, self.steps = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 10), 0

    def forward(self, x):
        if self.training:
            self.steps += 1
        return self.head(self.conv(x).relu().mean((2, 3)) * min(1.0, self.steps / 100))


def test_a_model_that_computes_otherwise_at_every_call_is_refused():
    student = CountsItsSteps()
    plan = partition(models.make("residual"), student, models.images(2))
    with pytest.raises(PlanError, match=r"differs by .* when it takes a training step") as caught:
        certify(plan)
    assert "keeps state between calls" in caught.value.notes["why"]
    assert student.steps == 0
    plain = synthesize(plan, depths=())
    plain(models.images(4))
    assert student.steps == 1


class OverwritesItsInput(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = models.chain(width)

    def forward(self, x):
        x.sub_(0.5).mul_(2)
        return self.body(x)


@pytest.mark.parametrize("depths", [None, ()])
def test_a_teacher_that_overwrites_its_input_leaves_it_to_the_student(depths):
    teacher, student = (models.settled(OverwritesItsInput(width)) for width in (16, 8))
    for learner in (student, models.make("chain")):
        learner.eval()
        plan = partition(teacher, learner, models.images(2))
        images = models.images(5)
        logits = synthesize(plan, depths=depths, fold=False).eval()(images.clone())
        assert torch.equal(logits.student, learner(images.clone()))
        assert torch.equal(logits.teacher, teacher.eval()(images.clone()))


def test_models_of_two_precisions_are_refused():
    plan = partition(models.make("chain").double(), models.make("chain"), models.images(2))
    with pytest.raises(PlanError, match="computes in float64, student in float32"):
        synthesize(plan)


def test_double_precision_is_certified():
    assert_no_gap(certify(planned("residual", "residual", dtype=torch.float64)))


def test_an_input_that_a_batch_lacks_is_named():
    with pytest.raises(UsageError, match="lacks the input input"):
        synthesize(planned())({"x": models.images(2)})


# plans of wide cuts and several inputs ───────────────────────────────────────────────────────────


class TwoStreams(nn.Module):
    """CrossViT: two streams that only meet at the head; no single tensor holds them together."""

    def __init__(self, width=6):
        super().__init__()
        self.left = nn.ModuleList(
            nn.Conv2d(3 if i == 0 else width, width, 3, padding=1) for i in range(3)
        )
        self.right = nn.ModuleList(
            nn.Conv2d(3 if i == 0 else width, width, 3, padding=1) for i in range(3)
        )
        self.head = nn.Linear(2 * width, models.CLASSES)

    def forward(self, x):
        left, right = x, x.flip(-1)
        for one, other in zip(self.left, self.right, strict=True):
            left, right = one(left).relu(), other(right).relu()
        return self.head(torch.cat([left.mean((2, 3)), right.mean((2, 3))], 1))


def test_two_streams_are_cut_by_pairs_of_tensors_and_certified():
    teacher = TwoStreams()
    plan = partition(teacher, models.make("chain"), models.images(2), blocks=2)
    assert {pair.teacher.width for pair in plan.alignment.boundaries} == {2}
    assert [len(stone.adapters) for stone in plan.stones] == [2, 2]
    proof = certify(plan)
    assert_no_gap(proof)
    assert proof.stones == 2
    logits = synthesize(plan)(models.images(5))
    assert logits.stones.shape == (2, 5, models.CLASSES)


def test_a_plan_of_wide_cuts_round_trips_with_lists_of_names(tmp_path):
    plan = partition(TwoStreams(), models.make("chain"), models.images(2), blocks=2)
    plan.save(tmp_path / "plan.yaml", certify(plan).as_dict())
    text = (tmp_path / "plan.yaml").read_text()
    assert "teacher: [" in text
    assert "certificate:" in text
    again = read_plan(tmp_path / "plan.yaml", *traces(plan))
    assert again.hash == plan.hash


def test_several_inputs_are_distilled_by_name():
    from tests.test_tracing import TwoInputs

    example = {"image": models.images(2), "mask": torch.ones(2)}
    plan = partition(TwoInputs(), TwoInputs(), example, blocks=1)
    assert_no_gap(certify(plan))
    batch = {"image": models.images(5), "mask": torch.arange(5.0)}
    stones = synthesize(plan)
    logits = stones(batch)
    assert logits.student.shape == (5, 10)
    block_kd_loss(logits, models.labels(5)).total.backward()
    assert all(weight.grad is not None for weight in stones.student.parameters())


def test_adapters_of_limited_size_are_factored_and_kept_in_the_plan(tmp_path):
    plan = planned("residual", "residual", max_adapter_parameters=400)
    assert plan.stones[-1].adapters[0].rank
    stones = synthesize(plan)
    for group in stones.adapters.values():
        assert sum(weight.numel() for weight in group.parameters()) <= 400
    plan.save(tmp_path / "plan.yaml")
    assert "rank: " in (tmp_path / "plan.yaml").read_text()
    assert read_plan(tmp_path / "plan.yaml", *traces(plan)).hash == plan.hash


class Tokens(nn.Module):
    """ViT: patches as tokens after a class token; the head reads the class token alone."""

    def __init__(self, width=12, depth=2):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 17, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 24, batch_first=True) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, models.CLASSES)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class CallsAPart(Tokens):
    """A part of a layer is called once more by itself."""

    def forward(self, x):
        return super().forward(x) + self.head(self.blocks[0].norm1(self.patch(x).mean((2, 3))))


def test_a_layer_of_which_a_part_is_called_too_is_certified():
    plan = partition(CallsAPart(), CallsAPart(), models.images(2))
    assert_no_gap(certify(plan))
    targets = synthesize(plan).teacher.by_target
    assert {"blocks.0", "blocks.0.norm1"} <= set(targets)


def test_a_layer_of_two_names_stays_one_in_the_frozen_teacher():
    teacher = Tokens()
    for block in teacher.blocks:
        block.norm2 = block.norm1
    plan = partition(teacher, models.make("residual"), models.images(2))
    assert_no_gap(certify(plan))
    stones = synthesize(plan)
    assert teacher.blocks[0].norm1.weight.device.type == "cpu"  # the teacher keeps its weights
    twin = stones.double().teacher.by_target["blocks.1"]
    assert twin.norm1 is twin.norm2 is not teacher.blocks[1].norm1
    assert twin.norm1.weight.dtype == torch.float64
    assert teacher.blocks[1].norm1.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("teacher", "student"),
    [(Tokens, models.Residual), (models.Residual, Tokens), (Tokens, Tokens)],
)
def test_maps_and_tokens_are_paired_and_every_stone_teaches(teacher, student):
    plan = partition(teacher(), student(), models.images(2))
    assert len(plan.stones) >= 2
    proof = certify(plan)
    assert_no_gap(proof)
    assert proof.stones == len(plan.stones)
