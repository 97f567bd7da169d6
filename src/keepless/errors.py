"""Every error that Keepless raises on purpose.

::

    KeeplessError
    |-- BudgetError          a budget that cannot be read: "8 bananas", True, -1
    |-- InfeasibleBudget     no plan found under the budget; carries `.smallest_budget` and `.bound`
    |-- CaptureError         the model cannot be captured as one graph
    |   |-- BatchError       the model's forward rejects this batch
    |   |   `-- PositionError  it is longer than a table of positions
    |   |-- CheckpointingError  the model checkpoints already; carries `.places`
    |   |-- DataDependentError  the forward needs a tensor's data in Python
    |   |-- LossError        the loss is not a scalar, or has no gradient
    |   `-- ParameterError   nothing to train, or parameters that cannot be planned for
    |       `-- ArgumentError  an argument of Keepless that has no such value: engine=, blocks=, on_oom=
    |-- DeviceError          a device that is not in the table, or a file of one that cannot be used
    |-- GraphError           a graph file that cannot be read, or a graph that cannot be run
    |-- GuardError           a planned model was called in a way that its plan does not cover
    |-- StepError            a training step cannot go on (used twice, changed in between)
    |   |-- StaleTensorError a parameter or input was changed between forward and backward
    |   |-- ReplayError      a second or double backward that cannot be replayed
    |   |-- OutOfMemory      an allocation failed and nothing was left to tighten; carries `.suggested_budget`
    |   |-- TornStep         an optimizer's step ended half way; carries `.updated` and `.half_updated`
    |   `-- RecomputeError   a checkpointed region cannot be run again as it ran
    |-- PlanError            a plan file that cannot be read, or was made for something else
    |-- ProgramError         a program breaks a rule of the machine; carries `.rule` and `.index`
    |-- AllocatorError       the modelled allocator cannot do what is asked; carries `.nbytes` and `.reserved`
    |-- IntegrationError     a trainer, or a setting of one, under which Keepless cannot train; says what to do
    |-- ArenaError           an arena that cannot be made within the budget, or an address plan that is wrong
    |-- MeasureError         a measurement failed
    |-- ReportError          a report file that cannot be read, or a report that cannot be made
    |-- RewriteError         a rewrite that is unknown, or that this step or this optimizer does not allow
    |-- SizeError            what is asked of `max_batch` and the like has no answer: its sizes, or what makes the batch
    `-- SolverError          an unknown solver, or a solver that broke its contract

User mistakes are one of these; an `AssertionError` is our own bug.
"""

from __future__ import annotations

from collections.abc import Mapping


class KeeplessError(Exception):
    """Base of everything that Keepless raises on purpose."""


class BudgetError(KeeplessError, ValueError):
    """A budget that cannot be read, or that is not a positive number of bytes."""


class InfeasibleBudget(KeeplessError):
    """No plan was found under the budget.

    Attributes:
        smallest_budget: bytes of the smallest budget for which a plan was found.
        bound: bytes that every plan needs at least (proven).
        blocking: the op that sets the floor, as "name (module, source line)".
        rewrites: names of rewrites that would lower it -> the smallest budget with them, in bytes.
    """

    def __init__(
        self,
        message: str,
        *,
        smallest_budget: int,
        bound: int,
        blocking: str = "",
        rewrites: Mapping[tuple[str, ...], int] | None = None,
    ) -> None:
        super().__init__(message)
        self.smallest_budget = smallest_budget
        self.bound = bound
        self.blocking = blocking
        self.rewrites = dict(rewrites or {})


class CaptureError(KeeplessError):
    """The model cannot be captured as one graph."""


class BatchError(CaptureError):
    """The model's forward rejects this batch."""


class PositionError(BatchError):
    """The batch is longer than a table of positions: a row is read beyond its end."""


class CheckpointingError(CaptureError):
    """The model checkpoints already, and that was not to be taken over or cannot be turned off.

    Attributes:
        places: the flags and wrapped modules, as paths from the model.
    """

    def __init__(self, message: str, *, places: tuple[str, ...]) -> None:
        super().__init__(message)
        self.places = places


class DataDependentError(CaptureError):
    """The forward needs a tensor's data in Python: `.item()`, or a branch on a value."""


class LossError(CaptureError):
    """The loss is not a scalar, is not a tensor, or has no gradient."""


class ParameterError(CaptureError):
    """Nothing to train, or parameters that cannot be planned for."""


class ArgumentError(ParameterError):
    """An argument that has no such value, or does not go with another one."""


class DeviceError(KeeplessError, ValueError):
    """A device that is not known, or a device file that cannot be used; says the place in the file."""


class GraphError(KeeplessError, ValueError):
    """A graph file that cannot be read, or a graph that cannot be run; says the place in the file."""


class GuardError(KeeplessError):
    """A planned model was called in a way that its plan does not cover."""


class StepError(KeeplessError, RuntimeError):
    """A training step cannot go on."""


class StaleTensorError(StepError):
    """A parameter, buffer or input was changed in place between its forward use and its backward use."""


class ReplayError(StepError):
    """A second or double backward that cannot be replayed exactly."""


class OutOfMemory(StepError):
    """The device ran out of memory in a planned step, and nothing was left to tighten, or the step could not go on.

    Where torch is there it is a `torch.OutOfMemoryError`, too.

    Attributes:
        phase: "forward", "recompute", "backward" or "optimizer".
        suggested_budget: bytes of a budget whose plan needs less than what failed; None where there is none.
        black_box: the file that was written about it; empty where none was.
    """

    def __init__(
        self, message: str, *, phase: str = "", suggested_budget: int | None = None, black_box: str = ""
    ) -> None:
        super().__init__(message)
        self.phase = phase
        self.suggested_budget = suggested_budget
        self.black_box = black_box


class TornStep(StepError):
    """An optimizer ran out of memory in the middle of its step, or a backward in which it steps did not reach its end:
    the parameters are no state of the training any more.

    Attributes:
        updated: names of the parameters whose update is complete.
        half_updated: names of those whose update began (or may not be complete), state included.
        black_box: the file that was written about it; empty where none was.
    """

    def __init__(
        self, message: str, *, updated: tuple[str, ...], half_updated: tuple[str, ...], black_box: str = ""
    ) -> None:
        super().__init__(message)
        self.updated = updated
        self.half_updated = half_updated
        self.black_box = black_box


class RecomputeError(StepError):
    """A checkpointed region cannot be, or was not, run again as it ran."""


class PlanError(KeeplessError):
    """A plan file that cannot be read, or a plan that was made for something else."""


class ProgramError(KeeplessError):
    """A program breaks a rule of the machine.

    Attributes:
        rule: "R1" ... "R7".
        index: number of the offending instruction, or the program's length for its end.
    """

    def __init__(self, message: str, *, rule: str, index: int) -> None:
        super().__init__(message)
        self.rule = rule
        self.index = index


class IntegrationError(KeeplessError):
    """A trainer, loop or compiler, or a setting of one, under which Keepless cannot train; says what to do."""


class ArenaError(KeeplessError):
    """An arena cannot be made within the budget, or an address plan is wrong."""


class AllocatorError(KeeplessError):
    """The model of CUDA's caching allocator runs out of memory, or is asked to free what it does not hold.

    Attributes:
        nbytes: of the request.
        reserved: bytes that it holds from the card.
    """

    def __init__(self, message: str, *, nbytes: int, reserved: int) -> None:
        super().__init__(message)
        self.nbytes = nbytes
        self.reserved = reserved


class MeasureError(KeeplessError):
    """A measurement failed."""


class ReportError(KeeplessError, ValueError):
    """A report file that cannot be read, says the place in it; or a report that cannot be made of what was given."""


class RewriteError(KeeplessError, ValueError):
    """A rewrite that is unknown, or that this step or this optimizer does not allow; says why."""


class SizeError(KeeplessError, ValueError):
    """What is asked of `max_batch` and the like has no answer: sizes that are none, or what is to make the batch fails
    or makes the same for each size."""


class SolverError(KeeplessError):
    """An unknown solver, or a solver that broke its contract."""
