"""Values of the rows of an optimizer step, of all processes."""

import torch
from trl import SFTTrainer


class RowGathering(SFTTrainer):
    """What the processes tell each other in a step: O(global batch), the same on each of them."""

    _step_row_counts: list[int]

    def _own_rows(self, step_values: torch.Tensor) -> torch.Tensor:
        """This process' part of values of all processes' rows."""
        return step_values.split(self._step_row_counts)[self.accelerator.process_index]

    def _count_rows(self, num_own: int) -> list[int]:
        """Training rows of the optimizer step of each process: packed sequences hold different numbers of rows."""
        num_processes = self.accelerator.num_processes
        if num_processes == 1 or self.packed_training is None:
            return [num_own] * num_processes
        return self.accelerator.gather(torch.tensor([num_own], device=self.accelerator.device)).tolist()

    def _gather_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Values of all processes' training rows of the step, in the same order on each, on the CPU."""
        if self.accelerator.num_processes == 1:
            return values
        most = max(self._step_row_counts)
        padded = values.new_zeros((most, *values.shape[1:]))
        padded[: len(values)] = values
        parts = self.accelerator.gather(padded.to(self.accelerator.device)).cpu().split(most)
        return torch.cat([part[:count] for part, count in zip(parts, self._step_row_counts, strict=True)])

    def _gather_batches(self, values: list[torch.Tensor]) -> torch.Tensor:
        """The same, of the micro-batches of the step."""
        if not values:
            raise RuntimeError(
                "`compute_loss` was overridden without a call of `super().compute_loss(...)`, by which the rows' "
                "losses are known. Call it, and add to what it returns."
            )
        return self._gather_rows(torch.cat(values))

    def _sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values.to(self.accelerator.device)).cpu()

    def _reduce_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        # The coefficients divide by the tokens of all processes, or of this one
        reduction = "sum" if self.args.average_tokens_across_devices else "mean"
        return self.accelerator.reduce(gradient, reduction)

    def _any_process(self, condition: bool | torch.Tensor) -> bool:
        """Whether the condition holds on any process; all of them must take the same branch around a forward pass."""
        if self.accelerator.num_processes == 1:
            return bool(condition)
        flag = torch.as_tensor(condition, dtype=torch.int64, device=self.accelerator.device).reshape(1)
        return bool(self.accelerator.gather(flag).any())
