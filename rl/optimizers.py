"""Muon for the hidden matrices, AdamW for everything else, behind one optimizer interface."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """Two torch optimizers that step together and share one learning-rate schedule.

    Two-dimensional weights of blocks go to Muon at `learning_rate` (RMS matched to AdamW's
    update, so one rate serves both); embeddings, heads, vectors and convolutions go to AdamW.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        learning_rate: float,
        weight_decay: float = 0.0,
    ) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in named_parameters:
            hidden = parameter.ndim == 2 and not any(
                word in name for word in ("embed", "lm_head", "position", "table", "proj_out")
            )
            (matrices if hidden else others).append(parameter)
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(
                torch.optim.Muon(
                    matrices,
                    lr=learning_rate,
                    weight_decay=weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if others:
            self._parts.append(
                torch.optim.AdamW(
                    others, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98)
                )
            )
        super().__init__(
            [group for part in self._parts for group in part.param_groups], {"lr": learning_rate}
        )
        # One set of groups, seen from both sides: a schedule on this object reaches the parts.
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups = [group]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step both optimizers."""
        assert closure is None
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Return both states."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both states; the parameter groups stay shared with the schedule."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self._parts for group in part.param_groups]
