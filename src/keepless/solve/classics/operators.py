"""What torch's partitioner thinks of operators (`get_default_op_list` in torch 2.11), as plain names."""

from __future__ import annotations

_COMPUTE_INTENSIVE = """
mm bmm addmm convolution convolution_backward upsample_bilinear2d _scaled_mm _flash_attention_forward
_efficient_attention_forward _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention
_scaled_dot_product_flash_attention_for_cpu
"""

_FUSIBLE = """
add sub div atan2 mul max min pow remainder fmod eq ne ge gt le lt abs bitwise_not ceil floor frac neg relu round silu
trunc log log10 log1p log2 lgamma exp expm1 erf erfc cos acos cosh sin asin sinh tan atan tanh atanh sqrt rsqrt
reciprocal sigmoid softplus threshold threshold_backward clamp clamp_min clamp_max where lerp addcmul addcdiv gelu
gelu_backward tanh_backward sigmoid_backward silu_backward sum mean amax to type_as squeeze unsqueeze rsub _to_copy view
slice t expand as_strided permute select split clone full_like var std _unsafe_view reshape scalar_tensor ones new_zeros
arange triu var_mean isinf any full zeros empty empty_like argmax maximum minimum index gather zeros_like hardtanh
hardswish hardsigmoid elu leaky_relu mish masked_fill logical_not native_dropout rand_like randn_like bernoulli
"""

COMPUTE_INTENSIVE = frozenset(_COMPUTE_INTENSIVE.split())
"""Operators that the partitioner never runs again on its own."""

FUSIBLE = frozenset(_FUSIBLE.split())
"""Operators that it takes for free to run again: its allowlist, the usual pointwise ones, and draws."""


def base_name(name: str) -> str:
    """The operator without namespace and overload: "mm" of "aten.mm.default", "grad" of "grad"."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else name
