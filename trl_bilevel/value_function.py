"""
The value function: what the lower level alone would make of each training row.

The penalty form of the bilevel problem compares theta with theta-hat, the solution of the lower level, so that the
selector follows the excess loss l_i(theta) - l_i(theta-hat) and not the loss itself, which is high for any hard row.
With a PEFT adapter theta-hat is a second set of values for the adapter's parameters on the same, also quantized, base.
"""

import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .whole_files import damage_explained, write_whole


logger = get_logger(__name__)

VALUE_FUNCTION_FILE_NAME = "_value_function.safetensors"
"""In every checkpoint and output folder. Trainer pushes no file of an output folder whose name starts with `_`."""
OPTIMIZER_FILE_NAME = "_value_function_optimizer.pt"
_CURE = "Use another checkpoint."


class ValueFunction:
    """
    theta-hat: other values for the trained parameters of a model, with an optimizer of their own.

    The model itself never holds two adapters: [`active`] swaps the values in for a forward and backward pass, and out
    again. So whatever saves, merges, evaluates or generates with the model sees the user's adapter only.

    Args:
        model (`torch.nn.Module`): holds the parameters.
        names (`list[str]`): of the model's trained parameters; theta-hat starts with their values.
        make_optimizer (`Callable`): builds the optimizer of a list of parameters.
        max_grad_norm (`float`): the gradient is clipped to this norm; 0 for no clipping.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        names: list[str],
        make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
        max_grad_norm: float,
    ):
        self._model = model
        self._models = self._find_parameters(names)
        self._own = {name: torch.nn.Parameter(value.detach().clone()) for name, value in self._models.items()}
        self._optimizer = make_optimizer(list(self._own.values()))
        self._max_grad_norm = max_grad_norm

    def _find_parameters(self, names: Iterable[str]) -> dict[str, torch.nn.Parameter]:
        parameters = dict(self._model.named_parameters())
        return {name: parameters[name] for name in names}

    def rebind(self) -> None:
        """
        Find the model's parameters again.

        PEFT replaces them, also in another precision, when it loads a checkpoint; values can only be swapped between
        tensors of one precision on one device.
        """
        self._models = self._find_parameters(self._own)
        for name, parameter in self._models.items():
            self._own[name].data = self._own[name].data.to(parameter.device, parameter.dtype)

    def start(self) -> None:
        """
        Before training: with the model where it is now, without what an interrupted step left, and with the values of
        the first process, as data parallelism sends the model's own.
        """
        self.rebind()
        self._optimizer.zero_grad()
        for value in self._own.values():
            value.data = broadcast(value.data)

    @contextmanager
    def active(self) -> Iterator[None]:
        """theta-hat in place of theta, gradients included: a backward pass inside adds to theta-hat's."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self._models.items():
            own = self._own[name]
            parameter.data, own.data = own.data, parameter.data
            parameter.grad, own.grad = own.grad, parameter.grad

    def step(self, learning_rate: float, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """
        One optimizer step with the gradients since the last.

        Args:
            learning_rate (`float`): the model's own, at this step of its schedule.
            reduce (`Callable`): joins a gradient over all processes.
        """
        for parameter in self._own.values():
            if parameter.grad is None:  # no row of this process had a finite loss
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = reduce(parameter.grad)
        if self._max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self._own.values(), self._max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state(self) -> dict[str, torch.Tensor]:
        """theta-hat, by the names of the model's parameters."""
        return {name: value.detach() for name, value in self._own.items()}

    def save(self, directory: str | os.PathLike) -> None:
        """Write theta-hat to `_value_function.safetensors` in an existing directory, whole or not at all."""
        values = {name: value.contiguous() for name, value in self.state().items()}
        write_whole(Path(directory) / VALUE_FUNCTION_FILE_NAME, lambda partial: save_file(values, partial))

    def load(self, directory: str | os.PathLike) -> None:
        """
        Restore what `save` wrote.

        Raises:
            `FileNotFoundError`: if the directory holds no value function.
            `ValueError`: if the file is damaged or belongs to another adapter.
        """
        path = Path(directory) / VALUE_FUNCTION_FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist, so the value function cannot be restored. Resume from a checkpoint that was "
                "written with `value_function='adapter'`, or train from the start."
            )
        with damage_explained(path, _CURE):
            values = load_file(path)
        shapes = {name: value.shape for name, value in values.items()}
        if shapes != {name: value.shape for name, value in self._own.items()}:
            raise ValueError(f"{path} was written for another adapter: its parameters are {sorted(shapes)[:2]}, ...")
        self.rebind()
        with torch.no_grad():
            for name, value in values.items():
                self._own[name].copy_(value)

    def save_optimizer(self, directory: str | os.PathLike) -> None:
        """Write the state of theta-hat's optimizer to a checkpoint."""
        state = self._optimizer.state_dict()
        write_whole(Path(directory) / OPTIMIZER_FILE_NAME, lambda partial: torch.save(state, partial))

    def load_optimizer(self, directory: str | os.PathLike) -> None:
        """Restore what `save_optimizer` wrote; `ValueError` for a damaged file, or one with more than tensors."""
        path = Path(directory) / OPTIMIZER_FILE_NAME
        if not path.is_file():
            # As Trainer does for the model's own optimizer, after `save_only_model`
            logger.warning(f"{path} does not exist: the value function's optimizer starts anew.")
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{path} cannot be read as the state of an optimizer ({error}).") from error
        self._optimizer.load_state_dict(state)


def load_value_function(directory: str | os.PathLike, model: torch.nn.Module) -> ValueFunction | None:
    """
    The value function in a run's folder, for scoring with the adapter that was loaded from there; or `None`.

    Raises:
        `ValueError`: if the file is damaged or belongs to another adapter.
    """
    path = Path(directory) / VALUE_FUNCTION_FILE_NAME
    if not path.is_file():
        return None
    known = {name for name, _ in model.named_parameters()}
    with damage_explained(path, _CURE), safe_open(path, framework="pt") as file:
        names = list(file.keys())
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(f"{path} was written for another adapter: the model has no parameter {missing[0]!r}.")
    # Nothing is trained here: any optimizer will do
    value_function = ValueFunction(model, names, torch.optim.SGD, max_grad_norm=0.0)
    value_function.load(directory)
    return value_function


def fits_other_parameters(optimizer_class: Any, options: dict[str, Any]) -> bool:
    """Whether an optimizer can be built for other parameters than the model's, and needs no mode of its own."""
    is_class = isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)
    return (
        is_class  # and no factory that sorts the layers of a model
        and not {"params", "model", "optimizer_dict"} & options.keys()
        and "ScheduleFree" not in optimizer_class.__name__
    )


def optimizer_maker(
    optimizer_class: Any,
    options: dict[str, Any],
    weight_decay: float,
    name: str,
    are_decayed: list[bool] | None = None,
) -> Callable:
    """
    What builds the optimizer of theta-hat: the same kind as the model's.

    Args:
        optimizer_class, options: as `Trainer.get_optimizer_cls_and_kwargs` returns them.
        weight_decay (`float`): of the parameters that decay.
        name (`str`): `args.optim`, for the error.
        are_decayed (`list[bool]`, *optional*): which of the parameters do: Trainer's biases and norms do not. By
            default all.

    Raises:
        `ValueError`: for optimizers that are tied to the model's own parameters.
    """
    if not fits_other_parameters(optimizer_class, options):
        raise ValueError(
            f"`optim={name!r}` works on the layers of one model and cannot fit the value function's adapter too. Use "
            "another optimizer, for instance 'adamw_torch', or `value_function='none'`."
        )

    def make(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        marks = [True] * len(parameters) if are_decayed is None else are_decayed
        # As Trainer passes it: not every optimizer has the option, and all have it in their groups
        groups = [
            {
                "params": [one for one, mark in zip(parameters, marks, strict=True) if mark is decays],
                "weight_decay": decay,
            }
            for decays, decay in ((True, weight_decay), (False, 0.0))
        ]
        return optimizer_class([group for group in groups if group["params"]], **options)

    return make
