"""A process with less address space than everything kept needs: plain training fails, planned training goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, resource, sys
import torch
import keepless
from torch import nn

class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(16))

    def forward(self, x):
        for layer in self.layers:
            x = nn.functional.dropout(torch.tanh(layer(x)), 0.1, self.training)
        return x.square().mean()

def address_space():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize"))

def limit(nbytes):
    resource.setrlimit(resource.RLIMIT_AS, (nbytes, resource.getrlimit(resource.RLIMIT_AS)[1]))

def steps():
    torch.manual_seed(1)
    found = []
    for _ in range(2):
        model.zero_grad()
        loss = model(x)
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
    return [*found, torch.get_rng_state()]

torch.set_num_threads(1)
torch.manual_seed(0)
model, x = Chain(), torch.randn(131072, 16)
plan = keepless.plan(model, x, "4GiB")
extra = 2 * plan.smallest_budget
assert extra < plan.predicted_peak / 3
told = {"plain": "fits"}
limit(address_space() + extra)
try:
    steps()
except RuntimeError as error:
    told["plain"] = "out of memory" if keepless.is_out_of_memory(error) else repr(error)
keepless.apply(model, plan, black_box=sys.argv[1], background=False)
found = steps()
counters = model.forward.counters
told["steps"], told["ooms"], told["tightened"] = counters.steps, counters.ooms, counters.tightened
keepless.remove(model)
limit(resource.RLIM_INFINITY)
told["equal"] = all(map(torch.equal, found, steps()))
print(json.dumps(told))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
def test_training_goes_on_in_an_address_space_that_is_too_small(tmp_path: Path) -> None:
    place = {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2**20),  # what is freed is free: the heap keeps holes of aligned blocks
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env=os.environ | place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["plain"] == "out of memory"
    assert told["equal"] is True
    assert told["steps"] == 2
    assert told["ooms"] >= told["tightened"] >= 1
    assert len(list(tmp_path.iterdir())) == told["ooms"]
