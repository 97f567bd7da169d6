"""The op class of an op, by its name: which kernels of a device run it, roughly."""

from __future__ import annotations

from keepless.cost import efficiency as kinds

_WORDS: tuple[tuple[str, str], ...] = (
    (kinds.ATTENTION, "scaled_dot_product attention"),
    (kinds.RNN, "rnn lstm gru thnn_fused"),
    (kinds.CONV, "convolution conv_depthwise slow_conv conv1d conv2d conv3d"),
    (kinds.RANDOM, "dropout bernoulli rand normal_functional draw_mask draw_in_place multinomial"),
    (kinds.NORM, "layer_norm batch_norm group_norm rms_norm instance_norm"),
    (kinds.SOFTMAX, "softmax"),
    (kinds.LOSS, "nll_loss cross_entropy mse_loss smooth_l1 huber_loss binary_cross_entropy kl_div"),
    (kinds.GATHER, "embedding index gather scatter topk sort max_pool adaptive upsample grid_sampler"),
    (kinds.MATMUL, "addmv mv dot matmul linear ger einsum"),
    (
        kinds.COPY,
        "copy clone cat stack materialize full zeros ones empty arange fill constant_pad slice_backward "
        "select_backward roll flip repeat lift_fresh",
    ),
    (kinds.REDUCE, "sum mean amax amin var norm prod logsumexp any all argmax"),
    (kinds.TRANSCENDENT, "exp log tanh sigmoid gelu silu erf sin cos pow softplus mish glu"),
    (
        kinds.POINTWISE,
        "add sub mul div sqrt neg relu threshold hardtanh hardswish elu where clamp maximum minimum abs sign eq ne lt "
        "le gt ge logical bitwise apply_mask full_mask reciprocal square leaky tril triu floor ceil round remainder "
        "lerp fmod isnan avg_pool",
    ),
)
"""Op class -> parts of names; the first that fits wins."""

_EXACT = {
    "native_dropout_backward": kinds.POINTWISE,
    "masked_fill": kinds.POINTWISE,
    "linalg_vector_norm": kinds.REDUCE,
}
_WHOLE_WORDS = frozenset(
    {"mv", "dot", "ger", "all", "any", "sin", "cos", "eq", "ne", "lt", "le", "gt", "ge", "log", "pow", "var"}
    | {"add", "sub", "exp"}
)
"""Parts so short that they count only as a whole word of a name: "all" is not in "allclose"."""


def op_kind(name: str) -> str:
    """The op class of an op's name, "aten.addmm.default" or "keepless.apply_mask"; "other" where none is known."""
    parts = name.split(".")
    word = parts[1] if len(parts) > 1 else name
    if parts[0] == "keepless" and word in (kinds.LOSS, kinds.OPTIMIZER):
        return word
    if parts[0] == "keepless" and word == "update":
        return kinds.OPTIMIZER
    if word in _EXACT:
        return _EXACT[word]
    pieces = set(word.strip("_").split("_"))
    if pieces & {"mm", "addmm", "bmm", "baddbmm"}:
        return kinds.MATMUL
    for kind, found in _WORDS:
        if any((part in pieces) if part in _WHOLE_WORDS else (part in word) for part in found.split()):
            return kind
    return kinds.OTHER
