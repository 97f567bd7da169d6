"""Private parts of torch for sizes that stay symbols while a step is traced."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch._dispatch.python import enable_python_dispatcher as enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import symbolic_shapes
from torch.utils._sympy.value_ranges import ValueRanges

from keepless._compat.fakes import WatchedFakes


class SymbolicSizes(symbolic_shapes.ShapeEnv):
    """Sizes that stay symbols while a step is traced, and every answer that was given about them."""

    LARGEST = 1 << 20

    def __init__(self) -> None:
        super().__init__(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
        self.answers: dict[Any, Any] = {}
        self.symbols: list[Any] = []
        self.depth = 0

    def new_size(self, size: int) -> Any:
        """A size that is this one now, of at least 2 and at most `LARGEST`."""
        source = ConstantSource(source_name=f"keepless{len(self.symbols)}")
        bounds = symbolic_shapes.StrictMinMaxConstraint(vr=ValueRanges(lower=2, upper=self.LARGEST), warn_only=False)
        kind = symbolic_shapes.DimDynamic.DYNAMIC
        self.symbols.append(self.create_symbol(size, source=source, dynamic_dim=kind, constraint_dim=bounds))
        return self.create_symintnode(self.symbols[-1], hint=size, source=source)

    def evaluate_expr(self, orig_expr: Any, *args: Any, **kwargs: Any) -> Any:
        answer = super().evaluate_expr(orig_expr, *args, **kwargs)
        self.answers.setdefault(orig_expr, answer)
        return answer

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, "is it known?" counts as answered no where that depends on the sizes, but for fake kernels."""
        home: Any = symbolic_shapes
        known, quick = home._static_eval_sym_bool, getattr(home, "_sym_node_hint_disproves", None)

        def ask(question: Any) -> Any:
            if (answer := known(question)) is None and question.node.shape_env is self and not self.depth:
                self.answers.setdefault(question.node.expr, "false" in sys._getframe(1).f_code.co_name)
            return answer

        try:
            home._static_eval_sym_bool, home._sym_node_hint_disproves = ask, lambda node, target: False
            yield
        finally:
            home._static_eval_sym_bool, home._sym_node_hint_disproves = known, quick


class SymbolicMode(WatchedFakes):  # type: ignore[no-untyped-call]
    """Fake tensors that may have symbolic sizes."""

    def dispatch(self, *args: Any, **kwargs: Any) -> Any:
        sizes: Any = self.shape_env
        sizes.depth += 1
        try:
            return super().dispatch(*args, **kwargs)
        finally:
            sizes.depth -= 1


def uncached_fakes() -> FakeTensorMode:
    """A mode that works every result out anew."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.cache_enabled = False
    return mode
