"""What the processes of `benchmarks.peers.nursery` begin with: imports, and nothing that runs an op."""

from __future__ import annotations

import contextlib
import importlib

for _name in (
    "benchmarks.peers.steps",
    "torch._dynamo",
    "torch._functorch.aot_autograd",
    "torch._inductor.compile_fx",
    "torch.profiler",
    "timm",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.t5.modeling_t5",
    "transformers.models.vit.modeling_vit",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)
