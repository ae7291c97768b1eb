"""Adapters: every pair of layouts, who feeds whom, budgets, and the least-squares start."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

from kdsurgeon.adapters import Adapter, AdapterSpec, Fit, adapter_for, build, num_parameters
from kdsurgeon.adapters import fitting as fitting_module
from kdsurgeon.errors import DataError, NumericsError, PlanError
from kdsurgeon.layouts import Activation
from kdsurgeon.partitioning import CutPoint


def layout(axes, *sizes, name="node", grid=None, prefix=0, rectified=False, normalized=False):
    """An activation of these sizes, in the order of its axes without the batch."""
    if axes == "BCHW":
        grid = (sizes[1], sizes[2])
    if axes == "BHWC":
        grid = (sizes[0], sizes[1])
    return Activation(name, sizes, axes, grid, prefix, rectified, normalized)


def cut_at(*tensors):
    return CutPoint(tensors, 0.5, True)


def spec_for(source, target, **kwargs):
    (spec,) = adapter_for(cut_at(source), cut_at(target), **kwargs)
    return spec


def values(activation, batch, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = list(activation.shape)
    shape.insert(activation.axes.index("B"), batch)
    value = torch.randn(shape, generator=generator).to(dtype)
    return value.relu() if activation.is_rectified else value


def cells(value, activation):
    """The slow twin of an adapter's view: (batch, positions, channels), read axis by axis."""
    order = [activation.axes.index(axis) for axis in activation.axes if axis not in "BC"]
    value = value.permute(activation.axes.index("B"), *order, activation.axes.index("C"))
    return value.reshape(len(value), -1, activation.channels)


# every pair of layouts ───────────────────────────────────────────────────────────────────────────

LAYOUTS = {
    "map 6×6": layout("BCHW", 8, 6, 6),
    "map 3×3": layout("BCHW", 6, 3, 3),
    "rectified map 7×16": layout("BCHW", 5, 7, 16, rectified=True),
    "channels-last map 4×9": layout("BHWC", 4, 9, 7, normalized=True),
    "pooled map": layout("BCHW", 9, 1, 1),
    "tokens of a grid": layout("BTC", 12, 5, grid=(3, 4)),
    "class token and grid": layout("BTC", 17, 6, grid=(4, 4), prefix=1),
    "class and registers": layout("BTC", 14, 6, grid=(3, 3), prefix=5, normalized=True),
    "tokens without a grid": layout("BTC", 10, 7),
    "post-norm tokens with a class token": layout("BTC", 10, 7, prefix=1, normalized=True),
    "channels before time": layout("BCT", 6, 11),
    "time before batch": layout("TBC", 10, 8, prefix=2),
    "vector": layout("BC", 12),
    "rectified vector": layout("BC", 5, rectified=True),
}
PAIRS = [
    (source, target)
    for source, target in product(LAYOUTS, LAYOUTS)
    if LAYOUTS[source].kind != "vector" or LAYOUTS[target].positions == 1
]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_layout_is_carried_to_every_other(source, target):
    spec = spec_for(LAYOUTS[source], LAYOUTS[target])
    for dtype, batch in product((torch.float32, torch.bfloat16), (1, 5)):
        adapter = build(spec).to(dtype).train()
        value = values(spec.source, batch, dtype=dtype).requires_grad_()
        carried = adapter(value)
        assert carried.shape == values(spec.target, batch).shape
        assert carried.dtype == dtype
        assert carried.isfinite().all()
        if spec.target.is_rectified:
            assert (carried >= 0).all(), "a reader after a ReLU never sees a negative"
        elif batch > 1:  # the BatchNorm of one position, spread over a map, is zero
            assert (carried < 0).any()
        (carried * values(spec.target, batch, seed=1, dtype=dtype)).sum().backward()
        for parameter in (value, *adapter.parameters()):
            assert parameter.grad.isfinite().all()


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_autocast_keeps_the_dtype_of_the_input(source, target):
    spec = spec_for(LAYOUTS[source], LAYOUTS[target])
    adapter = build(spec)
    for dtype in (torch.float32, torch.bfloat16):
        value = values(spec.source, 2, dtype=dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            carried = adapter(value)
        assert carried.dtype == dtype
        assert carried.isfinite().all()
        carried.float().square().sum().backward()
        assert value.grad.isfinite().all()


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_samples_do_not_mix_outside_of_batch_statistics(source, target):
    spec = spec_for(LAYOUTS[source], LAYOUTS[target])
    adapter = build(spec).eval()
    value = values(spec.source, 5)
    axis, out = spec.source.axes.index("B"), spec.target.axes.index("B")
    alone = [adapter(one.unsqueeze(axis)) for one in value.unbind(axis)]
    torch.testing.assert_close(adapter(value), torch.cat(alone, out))


# what an adapter computes, against a slow twin ───────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (layout("BTC", 12, 5, grid=(3, 4)), layout("BCHW", 6, 3, 4)),
        (layout("BTC", 14, 5, grid=(3, 4), prefix=2), layout("BHWC", 3, 4, 6)),
        (layout("BCHW", 5, 3, 4), layout("BTC", 12, 6, grid=(3, 4))),
        (layout("BHWC", 3, 4, 5), layout("TBC", 12, 6, grid=(3, 4))),
        (layout("BCT", 5, 12), layout("BTC", 12, 6)),
        (layout("TBC", 12, 5), layout("BCT", 6, 12)),
    ],
)
def test_between_equal_grids_every_position_is_mapped_alone_and_in_order(source, target):
    adapter = build(spec_for(source, target)).eval()
    value = values(source, 3)
    expected = cells(value, source)[:, source.prefix :] @ adapter.channels.weight[..., 0, 0].T
    torch.testing.assert_close(
        cells(adapter(value), target), expected, rtol=1e-4, atol=1e-4
    )  # evaluation-mode BatchNorm divides by √(1 + 1e-5)


def test_shrinking_averages_areas_and_growing_interpolates():
    small, large = layout("BCHW", 1, 2, 3), layout("BTC", 24, 1, grid=(4, 6))
    for source, target in ((small, large), (large, layout("BTC", 6, 1, grid=(2, 3)))):
        adapter = build(AdapterSpec("resize", source, target))
        nn.init.ones_(adapter.channels.weight)
        value = values(source, 2)
        grid = cells(value, source).reshape(2, 1, *source.grid)
        resized = (
            nn.functional.interpolate(grid, (4, 6), mode="bilinear")
            if target is large
            else nn.functional.avg_pool2d(grid, 2)
        )
        torch.testing.assert_close(adapter(value).flatten(), resized.flatten())


def test_the_channel_map_stands_on_the_smaller_side():
    wide, tall = layout("BCHW", 2, 4, 16), layout("BCHW", 2, 16, 4)
    adapter = build(spec_for(wide, tall))
    seen = []
    adapter.channels.register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape)))
    adapter(values(wide, 2))
    assert seen == [(2, 2, 4, 4)]


def test_a_vector_gets_the_mean_of_the_positions_without_the_class_token():
    source, target = LAYOUTS["class token and grid"], layout("BC", 3)
    adapter = build(spec_for(source, target))
    value = values(source, 4)
    expected = value[:, 1:].mean(1) @ adapter.channels.weight[..., 0, 0].T
    torch.testing.assert_close(adapter(value), expected)


def test_a_shared_class_token_passes_through_the_same_map_as_the_positions():
    source, target = (layout("BTC", 17, width, grid=(4, 4), prefix=1) for width in (5, 6))
    adapter = build(spec_for(source, target))
    value = values(source, 3)
    torch.testing.assert_close(adapter(value), value @ adapter.channels.weight[..., 0, 0].T)


def test_a_missing_class_token_is_the_mean_of_the_positions_and_a_learned_vector():
    source, target = layout("BCHW", 5, 4, 4), layout("BTC", 18, 6, grid=(4, 4), prefix=2)
    adapter = build(spec_for(source, target))
    nn.init.normal_(adapter.prefix)
    carried = adapter(values(source, 3))
    for index in range(2):
        expected = carried[:, 2:].mean(1) + adapter.prefix[:, 0, index]
        torch.testing.assert_close(carried[:, index], expected)


@pytest.mark.parametrize("source", [name for name, one in LAYOUTS.items() if one.kind != "vector"])
@pytest.mark.parametrize("target", ["class token and grid", "class and registers"])
def test_a_head_that_reads_only_the_class_token_still_reaches_the_student(source, target):
    spec = spec_for(LAYOUTS[source], LAYOUTS[target])
    adapter = build(spec)
    value = values(spec.source, 3).requires_grad_()
    last = adapter(value)[:, spec.target.prefix - 1]
    (last * values(layout("BC", spec.target.channels), 3)).sum().backward()
    reached = cells(value.grad, spec.source).abs().sum((0, 2)) > 0
    if spec.source.prefix >= spec.target.prefix:
        assert reached.tolist() == [i == spec.target.prefix - 1 for i in range(len(reached))]
    else:
        assert reached[spec.source.prefix :].all(), "every position is taught through the mean"


def test_the_norm_is_what_the_receiver_expects():
    norms = {
        name: type(build(AdapterSpec("resize", LAYOUTS["map 6×6"], target)).norm).__name__
        for name, target in LAYOUTS.items()
    }
    assert norms == {
        "map 6×6": "BatchNorm2d",
        "map 3×3": "BatchNorm2d",
        "rectified map 7×16": "BatchNorm2d",
        "channels-last map 4×9": "BatchNorm2d",
        "pooled map": "Identity",
        "tokens of a grid": "Identity",
        "class token and grid": "Identity",
        "class and registers": "ChannelNorm",
        "tokens without a grid": "Identity",
        "post-norm tokens with a class token": "ChannelNorm",
        "channels before time": "Identity",
        "time before batch": "Identity",
        "vector": "Identity",
        "rectified vector": "Identity",
    }


def test_building_takes_nothing_from_the_random_state_and_repeats_by_seed():
    spec = spec_for(LAYOUTS["map 6×6"], LAYOUTS["map 3×3"])
    before = torch.get_rng_state()
    first, same, other = (build(spec, seed=seed).channels.weight for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


# which operation, who feeds whom, what it is called ──────────────────────────────────────────────

NAMED = [
    (layout("BCHW", 64, 16, 16), layout("BCHW", 128, 16, 16, rectified=True), "conv",
     "conv 1×1 64→128 + BN + ReLU"),
    (layout("BCHW", 64, 16, 16), layout("BCHW", 128, 8, 8), "downsample",
     "conv 3×3 ÷2 64→128 + BN"),
    (layout("BCHW", 64, 7, 7), layout("BCHW", 128, 4, 4), "downsample", "conv 3×3 ÷2 64→128 + BN"),
    (layout("BCHW", 64, 8, 8), layout("BHWC", 16, 16, 128), "upsample",
     "deconv 4×4 ×2 64→128 + BN"),
    (layout("BCHW", 64, 14, 14), layout("BCHW", 128, 9, 9), "resize",
     "resize 9×9, conv 1×1 64→128 + BN"),
    (layout("BCHW", 64, 8, 12), layout("BCHW", 128, 8, 6), "resize",
     "resize 8×6, conv 1×1 64→128 + BN"),
    (layout("BTC", 197, 192, grid=(14, 14), prefix=1), layout("BCHW", 256, 14, 14), "conv",
     "tokens→map 14×14, conv 1×1 192→256 + BN"),
    (layout("BTC", 197, 192, grid=(14, 14), prefix=1), layout("BCHW", 256, 7, 7), "downsample",
     "tokens→map 14×14, conv 3×3 ÷2 192→256 + BN"),
    (layout("BCHW", 256, 7, 7), layout("BTC", 196, 192, grid=(14, 14)), "resize",
     "map→tokens 7×7, resize 14×14, linear 256→192"),
    (layout("BCHW", 256, 7, 7), layout("BTC", 50, 192, prefix=1), "linear",
     "map→tokens 49, linear 256→192"),
    (layout("BTC", 16, 64), layout("BTC", 49, 128), "resize", "resize 49, linear 64→128"),
    (layout("BTC", 16, 64), layout("TBC", 16, 128), "linear", "linear 64→128"),
    (layout("BCHW", 64, 7, 7), layout("BC", 128), "linear", "mean of 7×7, linear 64→128"),
    (layout("BC", 64), layout("BC", 128), "linear", "linear 64→128"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "target", "operation", "name"), NAMED)
def test_an_adapter_is_chosen_by_its_grids_and_says_what_it_does(source, target, operation, name):
    spec = spec_for(source, target)
    assert (spec.operation, str(spec)) == (operation, name)


def test_a_limited_adapter_shows_its_factors():
    source, same = layout("BCHW", 64, 8, 8), layout("BCHW", 128, 8, 8)
    half = layout("BCHW", 128, 4, 4, rectified=True)
    assert str(AdapterSpec("conv", source, same, rank=8)) == "conv 1×1 64→8→128 + BN"
    assert (
        str(AdapterSpec("downsample", source, half, rank=8))
        == "depthwise 3×3 ÷2, conv 1×1 64→8→128 + BN + ReLU"
    )
    assert (
        str(AdapterSpec("downsample", source, half, rank=64))
        == "depthwise 3×3 ÷2, conv 1×1 64→128 + BN + ReLU"
    )


def test_identity_is_only_for_equal_layouts_and_only_by_name():
    target = LAYOUTS["map 6×6"]
    assert spec_for(target, target).operation == "conv"
    spec, value = AdapterSpec("identity", target, target), values(target, 2)
    assert build(spec)(value) is value
    assert str(spec) == "identity"
    with pytest.raises(PlanError, match=r"identity cannot carry 8×6×6 \(BCHW\) to 6×3×3") as caught:
        AdapterSpec("identity", target, LAYOUTS["map 3×3"])
    assert caught.value.notes["fix"] == "use downsample"
    with pytest.raises(PlanError, match=r"to 10×7 \(BTC with 1 prefix tokens\)"):
        AdapterSpec(
            "identity",
            LAYOUTS["tokens without a grid"],
            LAYOUTS["post-norm tokens with a class token"],
        )


def test_an_unknown_adapter_is_refused_with_the_nearest():
    target = LAYOUTS["map 6×6"]
    with pytest.raises(PlanError, match='no adapter is called "upsampel"') as caught:
        AdapterSpec("upsampel", target, target)
    assert "upsample" in caught.value.notes["fix"]


@pytest.mark.parametrize("operation", ["downsample", "upsample"])
def test_a_spatial_kernel_has_no_room_for_a_class_token(operation):
    sizes = {"downsample": ((4, 4), (2, 2)), "upsample": ((2, 2), (4, 4))}[operation]
    source, target = (layout("BTC", h * w + 1, 4, grid=(h, w), prefix=1) for h, w in sizes)
    with pytest.raises(PlanError, match=f"{operation} cannot carry") as caught:
        AdapterSpec(operation, source, target)
    assert caught.value.notes["fix"] == "use resize"
    without = layout("BTC", sizes[0][0] ** 2, 4, grid=sizes[0])
    assert build(AdapterSpec(operation, without, target))(values(without, 2)).shape == (
        2,
        target.positions,
        4,
    )


@pytest.mark.parametrize("rank", [0, 9, -1])
def test_an_impossible_rank_is_refused(rank):
    target = LAYOUTS["map 6×6"]
    with pytest.raises(PlanError, match=f"conv cannot have rank {rank}") as caught:
        AdapterSpec("conv", target, target, rank=rank)
    assert caught.value.notes["fix"] == "leave the rank out, or give 1 to 8"


def test_identity_has_no_rank():
    target = LAYOUTS["map 6×6"]
    with pytest.raises(PlanError, match="identity cannot have rank 1") as caught:
        AdapterSpec("identity", target, target, rank=1)
    assert caught.value.notes["fix"] == "leave the rank out"


def test_a_vector_is_spread_over_a_grid_only_by_name():
    vector, grid = layout("BC", 4, name="pooled"), layout("BCHW", 6, 3, 3, name="layer4")
    with pytest.raises(PlanError, match=r"pooled is a vector: it has no positions for layer4"):
        spec_for(vector, grid)
    spec = AdapterSpec("resize", vector, grid)
    assert str(spec) == "vector→map 1, resize 3×3, conv 1×1 4→6 + BN"
    carried = build(spec).eval()(values(vector, 2))
    torch.testing.assert_close(carried, carried[..., :1, :1].expand_as(carried))


def test_a_wide_cut_has_one_adapter_a_tensor_fed_by_the_nearest_resolution():
    student = cut_at(
        layout("BC", 99, name="pooled"),
        layout("BCHW", 8, 14, 14, name="fine"),
        layout("BCHW", 8, 7, 7, name="narrow"),
        layout("BCHW", 16, 7, 7, name="wide"),
        layout("BCHW", 16, 7, 7, name="late"),
    )
    teacher = cut_at(
        layout("BCHW", 32, 13, 13), layout("BTC", 50, 32, grid=(7, 7), prefix=1), layout("BC", 9)
    )
    specs = adapter_for(student, teacher)
    assert [spec.source.name for spec in specs] == ["fine", "wide", "pooled"]
    assert [spec.target for spec in specs] == list(teacher.tensors)


def test_prefix_tokens_do_not_count_as_resolution():
    plain, grid = layout("BTC", 50, 8, name="plain"), layout("BCHW", 8, 7, 7, name="grid")
    teacher = layout("BTC", 50, 8, grid=(7, 7), prefix=1)
    (spec,) = adapter_for(cut_at(plain, grid), cut_at(teacher))
    assert spec.source is grid


# budgets ─────────────────────────────────────────────────────────────────────────────────────────


def count(specs):
    return sum(p.numel() for spec in specs for p in build(spec).parameters())


BUDGETED = {
    "conv": (layout("BCHW", 24, 6, 6), layout("BCHW", 40, 6, 6)),
    "downsample": (layout("BCHW", 24, 6, 6), layout("BCHW", 40, 3, 3)),
    "upsample": (layout("BCHW", 24, 3, 3), layout("BCHW", 40, 6, 6)),
    "linear": (layout("BTC", 9, 24), layout("BTC", 10, 40, prefix=1, normalized=True)),
}


@pytest.mark.parametrize("operation", BUDGETED)
def test_a_budget_is_kept_and_spent_as_far_as_one_more_rank(operation):
    source, target = BUDGETED[operation]
    whole = spec_for(source, target)
    assert (whole.operation, whole.rank) == (operation, None)
    assert num_parameters(whole) == count([whole])
    least = count([AdapterSpec(operation, source, target, rank=1)])
    for budget in range(least, count([whole]) + 1, (count([whole]) - least) // 12):
        spec = spec_for(source, target, max_parameters=budget)
        assert count([spec]) <= budget
        value = values(source, 2)
        assert build(spec)(value).shape == build(whole)(value).shape
        if spec.is_factored:
            wider = AdapterSpec(operation, source, target, rank=min(spec.rank + 1, 24))
            assert count([wider]) > budget or not wider.is_factored


def test_a_kernel_becomes_depthwise_before_it_loses_rank():
    source, target = BUDGETED["downsample"]
    separable = 24 * 9 + 24 * 40 + 2 * 40
    spec = spec_for(source, target, max_parameters=separable)
    assert (spec.rank, spec.is_factored, num_parameters(spec)) == (24, False, separable)
    assert spec_for(source, target, max_parameters=separable - 1).is_factored


@pytest.mark.parametrize("operation", ["downsample", "upsample"])
def test_a_depthwise_kernel_starts_as_smoothing_that_keeps_a_constant(operation):
    source, target = BUDGETED[operation]
    adapter = build(AdapterSpec(operation, source, target, rank=4))
    inner = adapter.before(torch.ones(1, *source.shape))[..., 1:-1, 1:-1]
    torch.testing.assert_close(inner, torch.ones_like(inner))


def test_the_adapters_of_a_wide_cut_share_one_budget():
    student = cut_at(*(source for source, _ in BUDGETED.values()))
    teacher = cut_at(*(target for _, target in BUDGETED.values()))
    everything = count(adapter_for(student, teacher))
    for budget in (everything, everything - 1, 3000, 1500):
        specs = adapter_for(student, teacher, max_parameters=budget)
        assert count(specs) <= budget
        assert (count(specs) == everything) == (budget == everything)


def test_a_budget_below_rank_one_is_refused_with_the_least_that_fits():
    source, target = BUDGETED["conv"]
    least = 24 + 40 + 2 * 40
    with pytest.raises(PlanError, match=f"has as few as {least - 1} parameters") as caught:
        spec_for(source, target, max_parameters=least - 1)
    assert f"still have {least}" in caught.value.notes["why"]
    assert spec_for(source, target, max_parameters=least).rank == 1


# the least-squares start ─────────────────────────────────────────────────────────────────────────


def scattered(spec, seed):
    """An adapter whose every weight, and whose norm's statistics, are away from their start."""
    adapter = build(spec, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*adapter.named_parameters(), *adapter.named_buffers()):
            if name.startswith("before"):
                continue  # depthwise kernels keep their start: the fit is of the map after them
            noise = torch.rand(tensor.shape, generator=generator)
            if tensor.is_floating_point():
                tensor.copy_(0.5 + noise if tensor.ndim == 1 else noise - 0.3)
    return adapter.eval()


def fitted(spec, teacher, *, samples=400, batches=4, **kwargs):
    adapter = build(spec)
    fit = Fit(adapter, **kwargs)
    source = values(spec.source, samples)
    with torch.no_grad():
        target = teacher(source)
    axes = (spec.source.axes.index("B"), spec.target.axes.index("B"))
    for pair in zip(source.chunk(batches, axes[0]), target.chunk(batches, axes[1]), strict=True):
        fit.add(*pair)
    return adapter, fit.solve(), source, target


LINEAR = [
    (layout("BCHW", 5, 6, 6), layout("BCHW", 7, 6, 6), "conv", None),
    (layout("BHWC", 6, 6, 5), layout("BCHW", 7, 6, 6), "conv", None),
    (layout("BCHW", 5, 6, 6), layout("BHWC", 3, 3, 7), "downsample", None),
    (layout("BCHW", 5, 7, 5), layout("BCHW", 7, 4, 3), "downsample", None),
    (layout("BCHW", 5, 3, 3), layout("BCHW", 7, 6, 6), "upsample", None),
    (layout("BCHW", 5, 3, 3), layout("BTC", 37, 7, grid=(6, 6), prefix=1), "upsample", None),
    (layout("BCHW", 5, 6, 6), layout("BCHW", 7, 4, 4), "resize", None),
    (layout("BCHW", 5, 3, 3), layout("BCHW", 7, 5, 5), "resize", None),
    (layout("BCHW", 5, 3, 8), layout("BCHW", 7, 5, 5), "resize", None),
    (layout("BTC", 10, 5, grid=(3, 3), prefix=1), layout("BCHW", 7, 3, 3), "conv", None),
    (layout("BCHW", 5, 3, 3), layout("BTC", 11, 7, grid=(3, 3), prefix=2), "linear", None),
    (layout("BTC", 10, 5, grid=(3, 3), prefix=1),
     layout("BTC", 28, 7, grid=(5, 5), prefix=3), "resize", None),
    (layout("TBC", 9, 5), layout("BCT", 7, 9), "linear", None),
    (layout("BC", 5), layout("BC", 7), "linear", None),
    (layout("BCHW", 5, 4, 4), layout("BC", 7), "linear", None),
    (layout("BC", 5), layout("BCHW", 7, 3, 3), "resize", None),
    (layout("BCHW", 9, 6, 6), layout("BCHW", 7, 6, 6), "conv", 2),
    (layout("BCHW", 9, 6, 6), layout("BCHW", 7, 3, 3), "downsample", 2),
    (layout("BCHW", 9, 6, 6), layout("BCHW", 7, 3, 3), "downsample", 7),
    (layout("BCHW", 9, 3, 3), layout("BCHW", 7, 6, 6), "upsample", 2),
]  # fmt: skip


@pytest.mark.parametrize(("source", "target", "operation", "rank"), LINEAR)
def test_a_linear_map_that_exists_is_found(source, target, operation, rank):
    spec = AdapterSpec(operation, source, target, rank)
    adapter, score, inputs, wanted = fitted(spec, scattered(spec, seed=3))
    assert score > 0.999
    torch.testing.assert_close(adapter.eval()(inputs), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("source", "target", "operation", "rank"), LINEAR)
def test_the_fitted_adapter_predicts_alike_in_train_mode(source, target, operation, rank):
    spec = AdapterSpec(operation, source, target, rank)
    adapter, _, inputs, wanted = fitted(spec, scattered(spec, seed=3), samples=2000)
    error = (adapter.train()(inputs) - wanted).square().mean() / wanted.var()
    assert error < 1e-3, "the batch's statistics are those of the sample but for one tenth"


@pytest.mark.parametrize("operation", ["downsample", "upsample"])
def test_a_kernel_too_wide_for_its_gram_matrix_is_fitted_smooth(operation, monkeypatch):
    source, target = BUDGETED[operation]
    spec = AdapterSpec(operation, source, target)
    separable = scattered(AdapterSpec(operation, source, target, rank=24), seed=3)
    monkeypatch.setattr(fitting_module, "MOST_FEATURES", 100)
    adapter, score, inputs, wanted = fitted(spec, separable)
    assert score > 0.999
    torch.testing.assert_close(adapter.eval()(inputs), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["rectified map 7×16", "rectified vector"])
def test_a_rectified_target_is_fitted_and_then_rectified(target):
    spec = spec_for(layout("BCHW", 5, 7, 16), LAYOUTS[target])
    adapter, score, inputs, wanted = fitted(spec, scattered(spec, seed=3))
    predicted = adapter.eval()(inputs)
    assert score > 0.3
    assert (predicted >= 0).all()
    before = build(spec).eval()(inputs)
    assert (predicted - wanted).square().mean() < 0.7 * (before - wanted).square().mean()


@pytest.mark.parametrize("target", ["class and registers", "post-norm tokens with a class token"])
def test_before_a_layer_norm_the_normalised_target_is_fitted(target):
    target = LAYOUTS[target]
    spec = spec_for(layout("BTC", 10, 16, grid=(3, 3), prefix=1), target)
    adapter, score, inputs, wanted = fitted(spec, scattered(spec, seed=3), samples=1000)
    assert score > 0.8, "dividing by every token's own deviation is not linear"
    predicted = adapter.eval()(inputs)
    assert 1 - (predicted - wanted).square().mean() / wanted.var() > 0.8


def test_a_target_that_the_source_does_not_explain_keeps_the_initial_weights():
    spec = AdapterSpec("conv", layout("BCHW", 5, 4, 4), layout("BCHW", 7, 4, 4))
    start = copy.deepcopy(build(spec).state_dict())
    adapter, score, *_ = fitted(spec, lambda source: values(spec.target, len(source), seed=9))
    assert score < 0.02
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(tensor, start[name])


def test_constant_tensors_keep_the_initial_weights():
    spec = AdapterSpec("linear", layout("BC", 3), layout("BC", 2))
    noise = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    for source, target in [
        (torch.zeros(40, 3), noise),
        (torch.full((40, 3), 1e3), noise),
        (torch.randn(40, 3, generator=torch.Generator().manual_seed(1)), torch.full((40, 2), 7.0)),
    ]:
        adapter = build(spec)
        fit = Fit(adapter)
        fit.add(source, target)
        assert fit.solve() < 0.02
        assert torch.equal(adapter.channels.weight, build(spec).channels.weight)


def test_a_limited_rank_takes_the_best_map_of_that_rank():
    """Reduced-rank regression: what is left are the smallest directions of the predictions."""
    source, target = layout("BC", 9), layout("BC", 7)
    whole = scattered(AdapterSpec("linear", source, target), seed=3)
    deviations = torch.linspace(0.1, 4, 9)
    inputs = values(source, 4000) * deviations
    with torch.no_grad():
        wanted = whole(inputs)
    left = torch.linalg.svdvals(whole.channels.weight.detach()[..., 0, 0] * deviations) ** 2
    for rank in (1, 2, 3):
        adapter = build(AdapterSpec("linear", source, target, rank))
        fit = Fit(adapter, ridges=(1e-9,))
        fit.add(inputs, wanted)
        fit.solve()
        error = (adapter(inputs) - wanted).square().sum(1).mean().item()
        assert error == pytest.approx(left[rank:].sum().item(), rel=0.1)


def test_the_held_out_samples_have_no_part_in_the_fit():
    spec = AdapterSpec("linear", layout("BC", 3), layout("BC", 2))
    source = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    target = source[:, :2].clone()
    spoiled = target.clone()
    spoiled[9::10] = 50.0
    weights = []
    for wanted in (target, spoiled):
        adapter = build(spec)
        fit = Fit(adapter, ridges=(1e-6,))
        fit.add(source, wanted)
        score = fit.solve()
        weights.append(adapter.channels.weight.clone())
    assert score < 0.02, "spoiled samples are judged badly"
    assert torch.equal(weights[1], build(spec).channels.weight)
    torch.testing.assert_close(weights[0][..., 0, 0], torch.eye(2, 3), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rank", [None, 1])
def test_the_score_is_the_r2_of_the_held_out_samples(rank):
    spec = AdapterSpec("linear", layout("BC", 5), layout("BC", 2), rank)
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(200, 5, generator=generator)
    target = source[:, :2] * 3 + 5 + torch.randn(200, 2, generator=generator)
    adapter = build(spec)
    fit = Fit(adapter)
    for rows in (slice(0, 7), slice(7, 120), slice(120, 200)):
        fit.add(source[rows], target[rows])
    score = fit.solve()
    left, wanted = (adapter(source) - target)[9::10], target[9::10]
    expected = 1 - left.square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert score == pytest.approx(expected.item(), abs=1e-5)


def test_memory_does_not_grow_and_chunks_do_not_matter(monkeypatch):
    spec = AdapterSpec("downsample", layout("BCHW", 4, 6, 6), layout("BCHW", 5, 3, 3))
    whole, score, inputs, wanted = fitted(spec, scattered(spec, seed=3), batches=1)
    monkeypatch.setattr(fitting_module, "ROW_BUDGET", 1)
    fit = Fit(chunked := build(spec))
    sizes = []
    for pair in zip(inputs.split(50), wanted.split(50), strict=True):
        fit.add(*pair)
        sizes.append(sum(v.numel() for v in vars(fit).values() if isinstance(v, torch.Tensor)))
    assert len(set(sizes)) == 1
    assert fit.solve() == pytest.approx(score, abs=1e-6)
    for name, tensor in chunked.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_half_precision_adapters_and_tensors_are_fitted_too():
    spec = AdapterSpec("downsample", layout("BCHW", 4, 6, 6), layout("BCHW", 5, 3, 3), rank=4)
    adapter, teacher = build(spec).to(torch.bfloat16), scattered(spec, seed=3)
    inputs = values(spec.source, 300)
    fit = Fit(adapter)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = teacher(inputs)
        fit.add(inputs.bfloat16(), wanted.bfloat16())
    assert fit.solve() > 0.99
    predicted = adapter.eval()(inputs.bfloat16())
    assert predicted.dtype == torch.bfloat16
    assert (predicted - wanted).square().mean() < 0.01 * wanted.var()


def test_too_few_samples_are_refused():
    fit = Fit(build(AdapterSpec("linear", layout("BC", 3), layout("BC", 2))))
    fit.add(torch.zeros(9, 3), torch.zeros(9, 2))
    with pytest.raises(DataError, match="saw 9 samples") as caught:
        fit.solve()
    assert caught.value.notes["fix"] == "give it 10 or more"


def test_inputs_that_never_vary_are_fitted_by_the_mean():
    spec = spec_for(layout("BCHW", 4, 4, 4), layout("BCHW", 2, 4, 4))
    fit = Fit(adapter := build(spec))
    source = torch.tensor([0.6229, 1.0144, 0.0, 0.5873])[None, :, None, None].expand(7, 4, 4, 4)
    for seed in range(300):
        fit.add(source, values(spec.target, 7, seed=seed))
    assert abs(fit.solve()) < 0.01
    assert adapter(source).isfinite().all()


@pytest.mark.parametrize("sample", [0, 9])
def test_nan_is_refused_by_the_names_of_both_tensors(sample):
    spec = AdapterSpec("linear", layout("BC", 3, name="trunk"), layout("BC", 2, name="neck"))
    fit = Fit(build(spec))
    source = torch.zeros(20, 3)
    source[sample, 1] = float("nan")
    fit.add(source, torch.zeros(20, 2))
    with pytest.raises(NumericsError, match="met NaN or infinity") as caught:
        fit.solve()
    assert caught.value.notes["where"] == "trunk → neck"


def test_a_class_token_that_only_the_teacher_has_may_not_be_nan_either():
    spec = spec_for(layout("BCHW", 3, 2, 2), layout("BTC", 5, 4, grid=(2, 2), prefix=1))
    fit = Fit(build(spec))
    target = values(spec.target, 20)
    target[3, 0, 0] = float("nan")
    fit.add(values(spec.source, 20), target)
    with pytest.raises(NumericsError, match="met NaN or infinity"):
        fit.solve()


def test_an_identity_has_nothing_to_fit():
    target = LAYOUTS["map 6×6"]
    identity = build(AdapterSpec("identity", target, target))
    assert not isinstance(identity, Adapter)
    with pytest.raises(AssertionError, match="only an Adapter"):
        Fit(identity)
