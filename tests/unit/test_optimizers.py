"""Muon and AdamW as one optimizer: who gets what, how far it moves, and that it resumes."""

import io

import pytest
import torch
from torch import nn

from rl.optimizers import MuonAdamW
from rl.pretrain import trapezoid

LR = 0.01


class Model(nn.Module):
    """One parameter of each kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(10, 16)
        self.block = nn.Linear(16, 24)
        self.conv = nn.Conv1d(24, 8, 1)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 10, bias=False)

    def forward(self, ids):
        hidden = torch.tanh(self.block(self.embed_tokens(ids)))
        return self.lm_head(self.norm(self.conv(hidden.transpose(1, 2)).transpose(1, 2)))


def loss_of(model: Model, step: int) -> torch.Tensor:
    ids = torch.randint(10, (4, 6), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def train(model, optimizer, schedule, steps) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        schedule.step()


def parts(model):
    optimizer = MuonAdamW(list(model.named_parameters()), LR, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: trapezoid(s, 10, 2, 4))
    return optimizer, schedule


def test_everything_but_hidden_matrices_moves_as_adamw_says():
    model, twin = Model(), Model()
    optimizer = MuonAdamW(list(model.named_parameters()), LR, weight_decay=0.1)
    others = {name: p for name, p in twin.named_parameters() if name != "block.weight"}
    adamw = torch.optim.AdamW(others.values(), lr=LR, weight_decay=0.1, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if name in others:
                others[name].grad = parameter.grad.clone()
        optimizer.step()
        adamw.step()
    for name, parameter in model.named_parameters():
        if name in others:
            torch.testing.assert_close(parameter, others[name])


def test_a_hidden_matrix_moves_by_an_orthogonal_step_of_adamw_s_size():
    model = Model()
    optimizer = MuonAdamW(list(model.named_parameters()), LR)
    before = model.block.weight.detach().clone()
    model.block.weight.grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    moved = before - model.block.weight.detach()
    values = torch.linalg.svdvals(moved)
    assert torch.linalg.svdvals(model.block.weight.grad).max() > 5 * values.max()
    assert values.max() / values.min() < 1.9
    assert (moved * model.block.weight.grad).sum() > 0  # downhill
    # AdamW's usual step has a root mean square of 0.2 times the learning rate.
    assert 0.15 < float(moved.pow(2).mean().sqrt()) / LR < 0.25


def test_a_schedule_reaches_both_parts():
    model = Model()
    optimizer = MuonAdamW(list(model.named_parameters()), LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 0))
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, schedule, [0])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    train(model, optimizer, schedule, [1])
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_resumed_optimizer_goes_on_bit_for_bit(accelerated):
    whole = Model()
    train(whole, *parts(whole), range(8))

    first = Model()
    optimizer, schedule = parts(first)
    train(first, optimizer, schedule, range(4))
    file = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    weights, state, when = torch.load(file, weights_only=True)

    second = Model()
    second.load_state_dict(weights)
    optimizer, schedule = parts(second)
    if accelerated:  # what the Hugging Face trainer trains with
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState

        # Whatever ran before in this process: between accumulated batches no optimizer steps.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        second, optimizer, schedule = Accelerator(cpu=True).prepare(second, optimizer, schedule)
    optimizer.load_state_dict(state)
    schedule.load_state_dict(when)
    train(second, optimizer, schedule, range(4, 8))
    for (name, mine), other in zip(whole.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_a_model_of_matrices_alone_or_without_any_is_taken():
    for shapes in ([(4, 4)], [(4,)]):
        parameters = [(f"p{i}", nn.Parameter(torch.ones(s))) for i, s in enumerate(shapes)]
        optimizer = MuonAdamW(parameters, LR)
        for _, parameter in parameters:
            parameter.grad = torch.randn(parameter.shape)
        optimizer.step()
        assert all((p != 1).any() for _, p in parameters)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.25),
        (1, 0.5),
        (3, 1.0),
        (10, 1.0),
        (15, 1.0),
        (16, 0.8),
        (18, 0.4),
        (19, 0.2),
        (20, 0.02),
    ],
)
def test_the_trapezoid_rises_stays_and_falls_to_two_percent(step, expected):
    assert trapezoid(step, steps=20, warmup=4, decay=5) == pytest.approx(expected)


def test_a_trapezoid_without_ramps_is_flat():
    assert [trapezoid(step, 5, 0, 0) for step in range(5)] == [1.0] * 5
