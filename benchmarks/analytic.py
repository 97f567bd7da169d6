"""How near are seconds that were never measured, and what does it take to plan a step that no card here can hold?

    python -m benchmarks.analytic                     # seconds on this CPU, six models: 2 minutes on 2 cores
    python -m benchmarks.analytic --large             # Llama of 8 and 70 billion parameters planned, too

Seconds: this CPU is described as a device (`keepless.measure.probed_device`: one product, one copy), and the sum of a
step's op seconds, as measured one by one, is compared with the roofline's: as probed, corrected by the step's own ops,
and corrected by the ops of all other models. Ratios are predicted over measured; 1 is right.

Large: `keepless plan hf:config.json --device FILE` in a process of its own: its processor and wall seconds, and its
highest resident bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.common import RESULTS, ROOT, Table
from keepless.control import StepOptions
from keepless.control.planning import measure_step, read_settings
from keepless.control.works import works_of
from keepless.cost import Sample, Work, analytic_cost, calibrated, samples_of
from keepless.cost.model import CostModel
from keepless.ir import Graph
from keepless.measure import probed_device

import zoo  # isort: skip  (found through benchmarks.common)

MODELS = ("gpt2", "bert", "vit", "llama", "resnet50", "unet3d")
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
LARGE = {
    "llama-8b": (
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        'like = "h100"\nname = "h100"\nsource = "table"\n',
        1,
        "36GiB",
    ),
    "llama-70b": (
        {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
        'like = "h100"\nname = "h100-640"\nmemory = "640GiB"\nsource = "eight cards\' memory as one"\n',
        4,
        "400GiB",
    ),
}
"""Name -> (fields of the config, the device's file, rows, budget); 4096 tokens a row, bfloat16, no optimizer."""


def measured(name: str, size: str, seed: int) -> tuple[Graph, tuple[Work, ...], CostModel]:
    """A model's step with its work, and the seconds of its ops as measured here."""
    workload = zoo.build(name, size, seed)
    inputs, targets = workload.batch(0)
    loss = workload.loss
    loss_fn = None if loss is None else (lambda output, _: loss(output, targets))
    settings = read_settings(workload.model, 0, None, StepOptions(loss_fn=loss_fn, seed=seed))
    step = measure_step(workload.model, inputs, settings)
    return step.graph, works_of(step.capture.binding), step.cost


def compare(models: Sequence[str], size: str, seed: int, table: Table) -> None:
    """Rows of predicted over measured seconds."""
    device = probed_device("cpu")
    steps = {name: measured(name, size, seed) for name in models}
    samples: dict[str, list[Sample]] = {name: samples_of(*step) for name, step in steps.items()}
    for name, (_, works, cost) in steps.items():
        others = [sample for other in models if other != name for sample in samples[other]]
        total = sum(cost.seconds)
        table.add(name, "measured ops", "seconds", "s", total)
        for contender, found in (
            ("as probed", device),
            ("corrected by its own ops", calibrated(device, samples[name]).device),
            ("corrected by the other models' ops", calibrated(device, others).device if others else device),
        ):
            predicted = sum(analytic_cost(found, works).seconds)
            table.add(name, contender, "predicted_over_measured", "ratio", predicted / total)
            table.add(name, contender, "spread", "ratio", found.spread)


def plan_large(name: str, table: Table) -> None:
    """Rows of what planning a step takes in a process of its own."""
    fields, device, batch, budget = LARGE[name]
    with tempfile.TemporaryDirectory(prefix="keepless-analytic-") as folder:
        config, card = Path(folder) / "config.json", Path(folder) / "card.toml"
        config.write_text(json.dumps(LLAMA | fields))
        card.write_text(device)
        command = [sys.executable, "-m", "keepless.cli", "plan", f"hf:{config}", "--device", str(card), "--json"]
        command += ["--dtype", "bfloat16", "--batch-size", str(batch), "--seq-len", "4096", "--optimizer", "none"]
        command += ["--budget", budget, "--release-outputs"]
        start = time.perf_counter()
        with open(Path(folder) / "plan.json", "w+b") as out:
            environment = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
            process = subprocess.Popen(command, stdout=out, cwd=ROOT, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.perf_counter() - start
            out.seek(0)
            answer = json.loads(out.read())
    if process.returncode:
        raise SystemExit(f"keepless plan ended with {process.returncode}: {answer}")
    table.add(name, "planning", "seconds", "s", seconds)
    table.add(name, "planning", "processor_seconds", "s", usage.ru_utime + usage.ru_stime)
    table.add(name, "planning", "peak_rss", "bytes", usage.ru_maxrss * 1024)
    for key in ("budget", "predicted_peak", "baseline_peak", "smallest_budget"):
        table.add(name, "the plan", key, "bytes", answer[key])
    table.add(name, "the plan", "overhead", "ratio", answer["overhead"])
    table.add(name, "the plan", "num_replays", "count", answer["num_replays"])


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--size", default="small")
    parser.add_argument("--large", action="store_true", help="plan the large models, too")
    parser.add_argument("--only-large", action="store_true", help="plan the large models only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "analytic.csv")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    table = Table("cpu", options.seed)
    if not options.only_large:
        compare(options.models.split(","), options.size, options.seed, table)
    for name in LARGE if options.large or options.only_large else ():
        plan_large(name, table)
    table.write(options.out)
    shown = RichTable("model", "contender", "metric", "value")
    for row in table.rows:
        shown.add_row(row.model, row.contender, row.metric, f"{row.value:.4g}")
    Console().print(shown)


if __name__ == "__main__":
    main()
