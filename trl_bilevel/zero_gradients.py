"""A backward pass that every process takes part in, also one that has nothing to learn from."""

from typing import Any

import torch


class ZeroGradients:
    """
    Zero gradients for all parameters that a tensor was computed from, whatever NaN is on the way to them.

    Where parameters are spread over processes, a backward pass through the model is a sequence of collectives. A
    process whose rows are all broken must not be missing in it.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def loss(self, outputs: torch.Tensor) -> torch.Tensor:
        """Exactly 0, shape (); until [`clear`] the gradients that a backward pass accumulates are 0 as well."""
        waiting, seen = [outputs.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if isinstance(node, torch._C._functions.AccumulateGrad):  # type: ignore[attr-defined]
                self._handles.append(node.register_prehook(_zeros))
            waiting += [following for following, _ in node.next_functions]
        return (outputs.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) * 0).sum()

    def clear(self) -> None:
        """After the backward pass: parameters that outlive it get their gradients again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _zeros(gradients: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros_like(gradient) for gradient in gradients)


def loss_of_nothing(model: torch.nn.Module) -> torch.Tensor:
    """Exactly 0, shape (), also when parameters are NaN, with a zero gradient for every trained parameter."""
    empty = [parameter.flatten()[:0] for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([values.float() for values in empty]).sum()
