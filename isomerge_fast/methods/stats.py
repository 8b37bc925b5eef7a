"""Hold the evidence beside a merged Δ, and name the errors of deltas that no result can be made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Check:
    """Hold a number per matrix that is at most ``limit`` where the result is right."""

    value: Tensor
    limit: float


@dataclass(frozen=True)
class MergeStats:
    """Hold the evidence of one merge; its tensors stay on the device until ``read``, ``missed`` or ``to_dict``.

    Keys of ``values``, where the method has them: ``sigma_mean`` (σ̄), ``rank`` (directions kept), ``gap`` (relative
    gap at the cut k), ``k``, ``s``, ``same_directions`` (directions of tasks that count as one with others),
    ``delta_norms`` (‖Δ_t‖_F per task, on the CPU) and ``delta_largest`` (max |Δ_t|, of deltas from files).

    Keys of ``checks``, the certificate (docs/numerics.md): ``orthogonality`` and ``asymmetry`` of the polar factor,
    ``negative`` (its sign), ``rounding`` (the solver's own, which these hardly see), ``angle`` (subspaces, as an error
    of the merged Δ), ``unresolved`` (directions that the solver's rounding hides).
    """

    algorithm: str
    values: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, Check] = field(default_factory=dict)
    escalations: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()  # for the report, beside the evidence

    def read(self) -> MergeStats:
        """Return the evidence with all its tensors on the CPU, by one read of the device."""
        found = {("value", key): value for key, value in self.values.items() if isinstance(value, Tensor)}
        found |= {("check", key): check.value for key, check in self.checks.items()}
        away = {key: value for key, value in found.items() if not value.is_cpu}
        if not away:
            return self
        # Counts are whole numbers that float64 holds.
        together = torch.cat([value.double().flatten() for value in away.values()]).cpu()
        parts = together.split([value.numel() for value in away.values()])
        here = {
            key: part.to(value.dtype).view(value.shape) for (key, value), part in zip(away.items(), parts, strict=True)
        }
        return replace(
            self,
            values={key: here.get(("value", key), value) for key, value in self.values.items()},
            checks={
                key: replace(check, value=here.get(("check", key), check.value)) for key, check in self.checks.items()
            },
        )

    def missed(self) -> dict[str, Tensor]:
        """Return the checks that miss their limit, as booleans per matrix on the CPU. One read of the device."""
        if not self.checks:
            return {}
        # Not `>` for those that missed: NaN has.
        if all(check.value.ndim == 0 and check.value.is_cpu for check in self.checks.values()):
            found = [name for name, check in self.checks.items() if not float(check.value) <= check.limit]
            return {name: torch.ones((), dtype=torch.bool, device="cpu") for name in found}
        held = torch.stack([check.value <= check.limit for check in self.checks.values()]).cpu()
        if bool(held.all()):
            return {}
        return {name: ~flag for name, flag in zip(self.checks, held, strict=True) if not bool(flag.all())}

    def describe(self, missed: Mapping[str, Tensor]) -> str:
        """Return the worst value of every check that was missed, with its limit."""
        worst = {name: self.checks[name].value[flags].amax().item() for name, flags in missed.items()}
        return ", ".join(f"{name} {value:.1e} > {self.checks[name].limit:.0e}" for name, value in worst.items())

    def after(self, before: MergeStats, remark: str) -> MergeStats:
        """Return this evidence with the escalations of ``before`` and one more, ``remark``."""
        return replace(self, escalations=(*before.escalations, remark))

    def member(self, place: int) -> MergeStats:
        """Return the evidence of one matrix of a stack, whose numbers are [..., B]; once it is read."""

        def own(value: Any) -> Any:
            return value[..., place] if isinstance(value, Tensor) and value.ndim else value

        values = {key: own(value) for key, value in self.values.items()}
        checks = {key: Check(own(check.value), check.limit) for key, check in self.checks.items()}
        return replace(self, values=values, checks=checks)

    def replaced(self, rows: Tensor, part: MergeStats) -> MergeStats:
        """Return this evidence with the entries of the matrices in the mask ``rows`` replaced by those of ``part``."""

        zero = torch.zeros((), device="cpu")

        def put(whole: Any, new: Any) -> Any:
            # What is of every task may be as many numbers as there are matrices.
            if isinstance(whole, Tensor) and whole.shape == rows.shape and new.numel() in (1, int(rows.sum())):
                whole = whole.clone()
                whole[rows.to(whole.device)] = new.to(whole.dtype)
            return whole

        return replace(
            self,
            algorithm=self.algorithm if self.algorithm == part.algorithm else f"{self.algorithm}, {part.algorithm}",
            values={key: put(value, part.values.get(key)) for key, value in self.values.items()},
            # A check that the other solver does not need holds there.
            checks={
                key: Check(put(check.value, part.checks[key].value if key in part.checks else zero), check.limit)
                for key, check in self.checks.items()
            },
        )

    def to_dict(self) -> dict[str, Any]:
        values = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in self.values.items()}
        values |= {key: check.value.tolist() for key, check in self.checks.items()}
        result = {"algorithm": self.algorithm, **values}
        if self.checks:
            missed = self.missed()
            result["certified"] = not missed
            if missed:
                result["not_certified"] = self.describe(missed)
        if self.escalations:
            result["escalations"] = list(self.escalations)
        return result


class NotFiniteError(InputError):
    """Report deltas that hold NaN or Inf; ``tasks`` are their indices."""

    def __init__(self, tasks: list[int]) -> None:
        self.tasks = tasks
        super().__init__(f"deltas[{tasks[0]}] holds NaN or Inf (tasks with such values: {tasks})")


class OutOfRangeError(InputError):
    """Report finite deltas of sizes that no result can be made of."""


def require_kept(stats: MergeStats) -> None:
    """Raise OutOfRangeError where nothing was kept of the only Δ_t that is not 0. (Several may cancel.)"""
    rank, norms = stats.values.get("rank"), stats.values.get("delta_norms")
    if rank is None or norms is None or sum(norm > 0 for norm in norms.tolist()) != 1:
        return
    if not bool(torch.as_tensor(rank).any()):
        raise OutOfRangeError(f"‖Δ‖ of the tasks is {shown_norms(norms)}: no direction of it is told from rounding")


def shown_norms(norms: Tensor) -> str:
    """Return norms as a message has them."""
    return ", ".join(f"{norm:.3g}" for norm in norms.tolist())
