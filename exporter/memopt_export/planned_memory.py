"""What a checkpoint will need at run time, planned from its graph: the price by which pruning searches."""

from __future__ import annotations

from collections.abc import Callable

from memopt.errors import AnswerIsNo
from memopt_export.from_torch import draft
from memopt_export.plan import plan
from memopt_models.checkpoint import Checkpoint

_LISTED = 3  # tensors of unknown size that an error names


def planner() -> Callable[[Checkpoint, int], int]:
    """A function from a checkpoint and a batch to bytes: weights, inputs and the peak of activations together.

    An export and a plan take seconds, and what comes out depends on shapes alone: each set of shapes is planned once.
    The function raises InputRefused for a network that cannot be exported, AnswerIsNo where sizes depend on values.
    """
    known: dict[tuple[object, ...], int] = {}

    def price(checkpoint: Checkpoint, batch: int) -> int:
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in checkpoint.state.items())
        key = (checkpoint.network, str(checkpoint.settings), checkpoint.inputs, shapes, batch)
        if key not in known:
            found = plan(draft(checkpoint), batch=batch)
            if found.unknown:
                unknown = ", ".join(found.unknown[:_LISTED])
                raise AnswerIsNo(f"memory cannot be planned: the size of {unknown} depends on values")
            known[key] = found.total_bytes
        return known[key]

    return price
