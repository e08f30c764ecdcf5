"""The operator inside what people already have: a training loop of theirs, a compiled step, an exported program, sharded
parameters, checkpointing. What cannot be served says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import coarse_kernels as ck
from coarse_kernels.backends import reference
from tests.contract import GRADIENT_FLOOR
from tests.helpers import SCHEDULES, generator, gradient_error, leaf, make_problem

BACKENDS = [name for name in ("cpu", "reference") if name in ck.available_backends()]


class Network(nn.Module):
    """(B, 3, H, W) -> (B, C, H / 4, W / 4), as segmentation networks do."""

    def __init__(self, classes: int = 4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, classes, 1))

    def forward(self, image: Tensor) -> Tensor:
        return self.body(image)


def data(count: int = 8, size: int = 16, classes: int = 4) -> TensorDataset:
    gen = generator(0)
    labels = torch.randint(0, classes, (count, size, size), generator=gen)
    labels[torch.rand(labels.shape, generator=gen) < 0.3] = 255
    return TensorDataset(torch.rand(count, 3, size, size, generator=gen), labels)


def networks() -> tuple[nn.Module, nn.Module]:
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(Network())
    return made[0], made[1]


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


BEFORE_2_14 = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)


# --- a loop of somebody's ------------------------------------------------------------------------------------------------


def train_one_epoch(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Any],
    scheduler: Any,
    scaler: torch.amp.GradScaler | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """As tutorials and reference scripts have it: it knows a criterion of output and target, and nothing of ours."""
    model.train()
    for image, target in loader:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            output = model(image)
            loss = criterion(output, target)
        optimizer.zero_grad()
        if scaler is not None:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        scheduler.step()


def upsampled_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    logits = F.interpolate(logits.float(), target.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, target, ignore_index=255)


class Criterion(nn.Module):
    """Ours behind the two arguments that a loop gives."""

    def __init__(self, backend: str):
        super().__init__()
        self.loss = ck.AnnotationNLL(backend=backend)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.loss(logits, None, target).loss


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("dtype", "scaled", "bound"),
    [(None, False, 1e-5), (torch.bfloat16, False, 2e-3), (torch.float16, True, 2e-3)],
    ids=["float32", "autocast", "autocast and GradScaler"],
)
def test_an_external_loop_trains_as_with_cross_entropy(
    backend: str, schedule: str, dtype: torch.dtype | None, scaled: bool, bound: float
) -> None:
    trained = networks()
    for model, criterion in zip(trained, (Criterion(backend), upsampled_cross_entropy), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        scaler = torch.amp.GradScaler("cpu") if scaled else None
        with ck.use_schedule(schedule):
            for _ in range(3):
                loader = DataLoader(data(), batch_size=2)
                train_one_epoch(model, criterion, optimizer, loader, scheduler, scaler, dtype)
    assert largest_difference(*trained) < bound
    assert largest_difference(trained[0], networks()[0]) > 1e-3


@pytest.mark.slow
def test_the_trainer_of_transformers_trains_as_with_cross_entropy(tmp_path: Path) -> None:
    """A loop that is not ours, unmodified: SegFormer and the Trainer take the loss as a function."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    small = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "decoder_hidden_size": 16}
    # without dropout, whose masks the two runs would draw alike only by chance
    still = dict.fromkeys(("classifier_dropout_prob", "drop_path_rate", "hidden_dropout_prob"), 0.0)
    of = data(count=8, size=32)
    examples = [{"pixel_values": image, "labels": labels} for image, labels in of]
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
    )

    def ours(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return ck.annotation_objective(outputs.logits, [ck.Drawings(labels)]).loss

    def plain(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return upsampled_cross_entropy(outputs.logits, labels)

    losses = []
    for loss in (ours, plain):
        torch.manual_seed(0)
        model = transformers.SegformerForSemanticSegmentation(
            transformers.SegformerConfig(num_labels=4, **small, **still)
        )
        trainer = transformers.Trainer(model=model, args=options, train_dataset=examples, compute_loss_func=loss)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][0] != losses[0][-1]


# --- compiled and exported ------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_is_compiled_as_a_whole_trains_as_one_that_is_not(backend: str, compiler: str) -> None:
    """Forward, loss with a matrix, backward and optimizer in one function."""
    if compiler == "inductor" and backend == "reference" and BEFORE_2_14:
        pytest.skip("Inductor may lose gradients (pytorch/pytorch#185509), of which the backend warns")
    trained = networks()
    heads = [nn.Parameter(torch.zeros(1, 4, 4, 1, 1)), nn.Parameter(torch.zeros(1, 4, 4, 1, 1))]
    for number, model in enumerate(trained):
        matrix = heads[number]
        with torch.no_grad():
            matrix[0, range(4), range(4)] = 2.0
        optimizer = torch.optim.SGD([*model.parameters(), matrix], lr=0.1)

        def step(
            image: Tensor, target: Tensor, model: Any = model, matrix: Any = matrix, optimizer: Any = optimizer
        ) -> Tensor:
            optimizer.zero_grad()
            kinds = [ck.Drawings(target, matrix), ck.Drawings(target, weight=0.5)]
            loss = ck.annotation_objective(model(image), kinds, backend=backend).loss
            loss.backward()
            optimizer.step()
            return loss.detach()

        run = torch.compile(step, backend=compiler) if number else step
        for image, target in DataLoader(data(), batch_size=2):
            run(image, target)
    assert largest_difference(*trained) < 1e-6
    assert float((heads[0] - heads[1]).detach().abs().max()) < 1e-6
    assert largest_difference(trained[0], networks()[0]) > 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("points", [(4, 4), (8, 8), (1, 1)], ids=["strided", "pixel", "one-point"])
def test_who_compiles_the_reference_is_told_once_that_inductor_may_lose_gradients(
    points: tuple[int, ...], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_warned", False)
    labels = torch.randint(0, 3, (1, 8, 8))

    def loss(seg: Tensor) -> Tensor:
        return ck.annotation_objective(seg, [ck.Drawings(labels)], backend="reference").loss

    seg = torch.randn(1, 3, *points)
    loss(seg.requires_grad_())
    for wanted in (False, True, True):  # without a gradient none is lost
        torch.compile(loss, backend="aot_eager", fullgraph=True)(seg.detach().requires_grad_(wanted))
        assert wanted or not any(record.name == "coarse_kernels" for record in caplog.records)
        torch._dynamo.reset()
    told = [record for record in caplog.records if record.name == "coarse_kernels"]
    assert ["185509" in record.getMessage() for record in told] == [True] * (BEFORE_2_14 and points == (4, 4))


class _Exported(nn.Module):
    """A network with its loss, its posterior and its label map."""

    def __init__(self, backend: str):
        super().__init__()
        torch.manual_seed(0)
        self.network, self.backend = Network(), backend

    def forward(self, image: Tensor, matrices: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.network(image)
        loss = ck.annotation_nll(logits, matrices, labels, trace_weight=0.1, backend=self.backend).loss
        posterior = ck.annotation_posterior(logits, matrices, labels, backend=self.backend)
        return loss, posterior, ck.label_map(logits, labels.shape[1:], backend=self.backend)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_exported_program_computes_what_the_module_does(backend: str, tmp_path: Path) -> None:
    module = _Exported(backend).eval()
    image, labels = data(2)[:]
    arguments = (image, torch.randn(2, 4, 4, 2, 2, generator=generator(1)), labels)
    with torch.no_grad():
        program = torch.export.export(module, arguments)
        torch.export.save(program, tmp_path / "program.pt2")
        loaded = torch.export.load(tmp_path / "program.pt2").module()
        for one, other in zip(loaded(*arguments), module(*arguments), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


class _Mapped(nn.Module):
    def __init__(self, backend: str):
        super().__init__()
        self.backend = backend

    def forward(self, logits: Tensor, image: Tensor) -> Tensor:
        return ck.label_map(logits, image.shape[2:], backend=self.backend)


@pytest.mark.sampled(4)
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strict", [False, True])
def test_a_label_map_is_exported_for_images_of_any_size(backend: str, strict: bool) -> None:
    logits, sizes = (
        torch.randn(1, 3, 4, 4, generator=generator(0)),
        {2: Dim("H", min=8, max=64), 3: Dim("W", min=8, max=64)},
    )
    shapes = {"logits": None, "image": sizes}
    example = (logits, torch.zeros(1, 1, 9, 10))
    program = torch.export.export(_Mapped(backend), example, dynamic_shapes=shapes, strict=strict).module()
    assert torch.equal(program(logits, torch.zeros(1, 1, 20, 30)), ck.label_map(logits, (20, 30), backend=backend))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_label_map_of_many_sizes_is_compiled_once_or_twice(backend: str) -> None:
    compiled = 0

    def counting(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        nonlocal compiled
        compiled += 1
        return graph

    function = torch.compile(_Mapped(backend), fullgraph=True, backend=counting)
    logits = torch.randn(1, 3, 4, 4, generator=generator(0))
    for height in range(8, 18):
        expected = ck.label_map(logits, (height, 8), backend=backend)
        assert torch.equal(function(logits, torch.zeros(1, 1, height, 8)), expected)
    assert compiled <= 2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_exported_program_is_differentiated(backend: str) -> None:
    problem = make_problem(3, (6, 9), (2, 3))

    class Loss(nn.Module):
        def forward(self, seg: Tensor, cm: Tensor) -> Tensor:
            return ck.annotation_nll(seg, cm, problem.labels, backend=backend).loss

    assert problem.cm is not None
    exported = torch.export.export(Loss(), (problem.seg, problem.cm)).module()
    found = []
    for module in (exported, Loss()):
        seg, cm = leaf(problem.seg), leaf(problem.cm)
        assert seg is not None
        assert cm is not None
        found.append(torch.autograd.grad(module(seg, cm), (seg, cm)))
    for one, other in zip(*found, strict=True):
        assert gradient_error(one, other) < GRADIENT_FLOOR[torch.float32]


# --- checkpointing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_network_and_loss_changes_no_gradient(
    backend: str, schedule: str, reentrant: bool
) -> None:
    image, labels = data(2)[:]
    image.requires_grad_()  # or the old form of checkpointing sees nothing to do
    plain, kept = networks()

    def objective(model: nn.Module, image: Tensor) -> Tensor:
        kinds = [ck.Drawings(labels), ck.Drawings(labels, weight=0.5)]
        return ck.annotation_objective(model(image), kinds, backend=backend).loss

    with ck.use_schedule(schedule):
        objective(plain, image).backward()
        checkpoint(objective, kept, image, use_reentrant=reentrant).backward()
    for one, other in zip(plain.parameters(), kept.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


# --- distributed ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "name", ["seg_logits", "cm_logits", "labels", "transition", "class_weight", "pixel_weight", "normalizer"]
)
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_a_distributed_tensor_is_named_and_what_to_pass_instead(name: str, backend: str | None) -> None:
    """It ended in "no sharding strategy registered", or in a fake result."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    problem = make_problem(3, (4, 5), (2, 3), stream="random")
    given: dict[str, Any] = {
        "seg_logits": problem.seg,
        "cm_logits": problem.cm,
        "labels": problem.labels,
        "transition": problem.transition,
        "class_weight": torch.ones(3),
        "pixel_weight": torch.ones(problem.labels.shape),
        "normalizer": torch.tensor(3.0),
    }
    given[name] = distribute_tensor(given[name], init_device_mesh("cpu", (1,)), [Replicate()])
    wanted = rf"{name}: expected a plain tensor, got a DTensor; .*\.to_local\(\).*\.full_tensor\(\)"
    with pytest.raises(TypeError, match=wanted):
        ck.annotation_nll(**given, backend=backend)
    if name == "seg_logits":
        with pytest.raises(TypeError, match=wanted):
            ck.label_map(given[name], (8, 10), backend=backend)
        with pytest.raises(TypeError, match=wanted):
            ck.annotation_posterior(*(given[one] for one in ("seg_logits", "cm_logits", "labels")), backend=backend)
    if name == "labels":
        with pytest.raises(TypeError, match="positive_labels: expected a plain tensor, got a DTensor"):
            ck.estimate_transition(given[name], problem.labels, 3)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("backend", BACKENDS)
def test_sharded_parameters_of_network_and_matrices_get_the_gradients_of_whole_ones(backend: str) -> None:
    """FSDP2 gathers them for the forward: what reaches the operator is a plain tensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.network = Network()
            self.head = ck.ConfusionHead(4, channels=3, stride=4)

        def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
            return self.network(image), self.head(image)

    image, labels = data(2)[:]
    gradients = []
    for sharded in (False, True):
        model: nn.Module = Both()
        if sharded:
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        logits, matrices = model(image)
        kinds = [ck.Drawings(labels, matrices, trace_weight=0.01), ck.Drawings(labels, weight=0.5)]
        ck.annotation_objective(logits, kinds, backend=backend).loss.backward()
        found = [p.grad for p in model.parameters()]
        gradients.append([g.full_tensor() if sharded else g for g in found])  # type: ignore[union-attr]
    for whole, of_shards in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, of_shards, rtol=1e-6, atol=1e-8)
