"""The command `estimate`: what a training step would need, before any step is run."""

from __future__ import annotations

from keepless.cli.options import (
    Accumulates,
    BatchSize,
    Debug,
    Dtype,
    Json,
    ModelArgument,
    Optimizer,
    Outside,
    PlannedDevice,
    Quiet,
    Releases,
    RewriteOption,
    Seed,
    SeqLen,
    TakeoverOption,
)
from keepless.cli.session import planning, read_nbytes, session
from keepless.reporting.account import peak_account
from keepless.reporting.account_table import account_table


def estimate_command(
    model: ModelArgument,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    dtype: Dtype = "float32",
    optimizer: Optimizer = "adamw",
    device: PlannedDevice = "cpu",
    seed: Seed = 0,
    accumulate: Accumulates = False,
    release_outputs: Releases = False,
    outside: Outside = "0",
    takeover: TakeoverOption = False,
    rewrite: RewriteOption = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a training step would need: bytes by category and module, no budget, no step, nothing timed."""
    with session(as_json, debug, quiet) as current:
        from keepless import api
        from keepless.cli.models import Recipe, build, device_and_target

        device, on = device_and_target(model, device)
        built = build(Recipe(model, batch_size, seq_len, dtype, optimizer, device, 1e-3, seed))
        with planning("estimate") as progress:
            found = api.estimate(
                built.model,
                built.batch,
                optimizer=built.optimizer,
                loss_fn=built.loss_fn,
                accumulate=accumulate,
                release_outputs=release_outputs,
                outside=read_nbytes(outside),
                on=on,
                takeover=takeover,
                rewrites=rewrite or (),
                progress=progress,
            )
        current.answer = found.as_dict()
        current.show(account_table(peak_account(found.plain), "The plain step, at its peak"))
        current.show(account_table(peak_account(found.smallest), "The smallest plan, at its peak"))
        current.tell(str(found))
