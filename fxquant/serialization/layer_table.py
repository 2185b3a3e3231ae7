"""The modules that a file may hold, and the arguments of their constructors with types and ranges.

To support a class of torch.nn, add its name to `CLASS_NAMES`. If its constructor has an argument of
a new name, say in `KINDS` what that may be; an argument is saved from the attribute of the same
name unless `READERS` says how else.
"""

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.kernels.functions import FUNCTIONS
from fxquant.modules.embedding_bag import POOLINGS


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


LARGEST_ARGUMENT = 1 << 31  # of a size
MOST_LAYERS = 10_000  # of one recurrent module
MOST_EXPERTS = 10_000  # of one layer
MOST_PARTS = 16  # of a tuple

CLASS_NAMES = _words(
        "Identity Linear Bilinear Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d "
        "ConvTranspose3d Embedding LSTM GRU RNN LSTMCell GRUCell RNNCell MultiheadAttention "
        "TransformerEncoderLayer TransformerDecoderLayer BatchNorm1d BatchNorm2d BatchNorm3d "
        "SyncBatchNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d LayerNorm GroupNorm RMSNorm "
        "LocalResponseNorm CrossMapLRN2d ReLU ReLU6 LeakyReLU PReLU RReLU ELU SELU CELU GELU SiLU "
        "Mish Hardtanh Hardswish Hardsigmoid Hardshrink Softshrink Tanhshrink Threshold Softplus "
        "Softsign LogSigmoid GLU Sigmoid Tanh Softmax Softmin LogSoftmax Softmax2d Dropout "
        "Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout AvgPool1d AvgPool2d "
        "AvgPool3d MaxPool1d MaxPool2d MaxPool3d MaxUnpool1d MaxUnpool2d MaxUnpool3d "
        "FractionalMaxPool2d FractionalMaxPool3d LPPool1d LPPool2d LPPool3d AdaptiveAvgPool1d "
        "AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d "
        "AdaptiveMaxPool3d ConstantPad1d ConstantPad2d ConstantPad3d ZeroPad1d ZeroPad2d "
        "ZeroPad3d ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d "
        "ReplicationPad2d ReplicationPad3d CircularPad1d CircularPad2d CircularPad3d Upsample "
        "UpsamplingNearest2d UpsamplingBilinear2d PixelShuffle PixelUnshuffle ChannelShuffle "
        "Flatten Unflatten Fold Unfold CosineSimilarity PairwiseDistance MSELoss L1Loss "
        "SmoothL1Loss HuberLoss KLDivLoss CrossEntropyLoss NLLLoss BCELoss BCEWithLogitsLoss"
    )  # fmt: skip
# Classes of torch.nn that a file may not hold, and why.
UNSUPPORTED_CLASSES = {
    **dict.fromkeys(
        _words(
            "AdaptiveLogSoftmaxWithLoss CTCLoss CosineEmbeddingLoss GaussianNLLLoss "
            "HingeEmbeddingLoss LinearCrossEntropyLoss MarginRankingLoss MultiLabelMarginLoss "
            "MultiLabelSoftMarginLoss MultiMarginLoss NLLLoss2d PoissonNLLLoss SoftMarginLoss "
            "TripletMarginLoss TripletMarginWithDistanceLoss"
        ),
        "it computes a loss for training, which is no part of a quantized model",
    ),
    **dict.fromkeys(
        _words(
            "LazyBatchNorm1d LazyBatchNorm2d LazyBatchNorm3d LazyConv1d LazyConv2d LazyConv3d "
            "LazyConvTranspose1d LazyConvTranspose2d LazyConvTranspose3d LazyInstanceNorm1d "
            "LazyInstanceNorm2d LazyInstanceNorm3d LazyLinear"
        ),
        "once it has run it is the class without Lazy, and before that it cannot be traced",
    ),
    **dict.fromkeys(_words("Container RNNBase RNNCellBase"), "it is a base of other classes"),
    "DataParallel": "tracing unwraps it",
    "Transformer": "it is always traced, layer by layer",
    "EmbeddingBag": "its kernel reads memory at offsets that the file could choose: quantize it",
}
RECURRENT = (nn.RNNBase, nn.RNNCellBase)

Kind = Callable[[Any], bool]


def _whole(low: int, high: int) -> Kind:
    return lambda value: type(value) is int and low <= value <= high


def _several(kind: Kind) -> Kind:
    """One, or a tuple of some."""

    def check(value: Any) -> bool:
        if isinstance(value, tuple | list):
            return len(value) <= MOST_PARTS and all(map(kind, value))
        return kind(value)

    return check


def _parts(kind: Kind) -> Kind:
    """A tuple of some, not of none."""
    return lambda value: (
        isinstance(value, tuple) and 0 < len(value) <= MOST_PARTS and all(map(kind, value))
    )


def _or_none(kind: Kind) -> Kind:
    return lambda value: value is None or kind(value)


def _choice(*names: str) -> Kind:
    return lambda value: isinstance(value, str) and value in names


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _is_real(value: Any) -> bool:
    return type(value) in (int, float) and not math.isnan(value) and abs(value) <= 1 << 62


def _is_infinite_or_real(value: Any) -> bool:
    return _is_real(value) or (type(value) is float and math.isinf(value))


def _is_share(value: Any) -> bool:
    return _is_real(value) and 0 <= value <= 1


def _is_none(value: Any) -> bool:
    return value is None


_SIZE = _whole(0, LARGEST_ARGUMENT)
_SIZES = _several(_SIZE)
_OFFSETS = _several(_whole(-LARGEST_ARGUMENT, LARGEST_ARGUMENT))
_REALS = _several(_is_real)


def _is_padding(value: Any) -> bool:
    return _OFFSETS(value) or (isinstance(value, str) and value in ("same", "valid"))


def _named(kind: Kind, names: str) -> dict[str, Kind]:
    return dict.fromkeys(names.split(), kind)


KINDS: dict[str, Kind] = {
    **_named(
        _SIZE,
        "in_features out_features in1_features in2_features in_channels out_channels groups "
        "num_features num_channels num_groups num_embeddings embedding_dim input_size hidden_size "
        "proj_size embed_dim num_heads kdim vdim d_model nhead dim_feedforward num_parameters "
        "upscale_factor downscale_factor head_dim",
    ),
    "num_layers": _whole(1, MOST_LAYERS),
    "experts": _or_none(_whole(1, MOST_EXPERTS)),
    "channels": _or_none(_whole(1, LARGEST_ARGUMENT)),
    "dims": _whole(1, 3),
    **_named(_or_none(_SIZES), "kernel_size stride dilation output_padding normalized_shape"),
    "sizes": _parts(_whole(1, LARGEST_ARGUMENT)),
    "output_size": _or_none(_several(_or_none(_SIZE))),
    "size": _or_none(_several(_or_none(_whole(-LARGEST_ARGUMENT, LARGEST_ARGUMENT)))),
    "padding": _is_padding,
    **_named(
        _is_flag,
        "bias affine track_running_stats elementwise_affine scale_grad_by_freq sparse batch_first "
        "bidirectional inplace ceil_mode count_include_pad return_indices add_bias_kv "
        "add_zero_attn norm_first keepdim full log_target is_packed is_transposed "
        "include_last_offset",
    ),
    **_named(_or_none(_is_flag), "align_corners recompute_scale_factor"),
    "padding_mode": _choice("zeros", "reflect", "replicate", "circular"),
    "nonlinearity": _choice("tanh", "relu"),
    "function": _choice(*FUNCTIONS),
    "approximate": _choice("none", "tanh"),
    "activation": _choice("relu", "gelu"),
    "pooling": _choice(*POOLINGS),
    "reduction": _choice("none", "mean", "sum", "batchmean"),
    "mode": _choice("nearest", "linear", "bilinear", "bicubic", "trilinear", "nearest-exact"),
    **_named(_is_share, "p dropout label_smoothing"),
    **_named(
        _is_infinite_or_real,
        "negative_slope alpha beta threshold value lambd min_val max_val lower upper init "
        "norm_type layer_norm_eps k delta margin",
    ),
    **_named(_or_none(_is_real), "eps momentum max_norm"),
    "scale_factor": _or_none(_REALS),
    "output_ratio": _or_none(_several(_is_share)),
    **_named(_or_none(_whole(-LARGEST_ARGUMENT, LARGEST_ARGUMENT)), "padding_idx ignore_index"),
    **_named(_or_none(_OFFSETS), "dim start_dim end_dim"),
    "unflattened_size": _OFFSETS,
    "divisor_override": _or_none(_whole(1, LARGEST_ARGUMENT)),
    **_named(_is_none, "weight pos_weight process_group"),
}
# Arguments that say nothing about the module, or only where its first values come from.
_UNSAVED_ARGUMENTS = _words(
    "self device dtype size_average reduce min_value max_value _weight _freeze _random_samples "
    "args kwargs table layer layers matrix linear scale zero_point"
)
_RECURRENT_ARGUMENTS = _words(
    "input_size hidden_size num_layers bias batch_first dropout bidirectional"
)
_ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.LSTM: (*_RECURRENT_ARGUMENTS, "proj_size"),
    nn.GRU: _RECURRENT_ARGUMENTS,
    nn.RNN: (*_RECURRENT_ARGUMENTS, "nonlinearity"),
}


def _has_bias(module: Any) -> bool:
    return getattr(module, "bias", None) is not None


def _activation_name(layer: Any) -> Any:
    for name, function in (("relu", F.relu), ("gelu", F.gelu)):
        if layer.activation is function:
            return name
    return layer.activation


Reader = Callable[[Any], Any]
_LAYER_READERS: dict[str, Reader] = {
    "d_model": lambda layer: layer.self_attn.embed_dim,
    "nhead": lambda layer: layer.self_attn.num_heads,
    "dim_feedforward": lambda layer: layer.linear1.out_features,
    "dropout": lambda layer: layer.dropout.p,
    "activation": _activation_name,
    "layer_norm_eps": lambda layer: layer.norm1.eps,
    "batch_first": lambda layer: layer.self_attn.batch_first,
    "bias": lambda layer: _has_bias(layer.linear1),
}
READERS: dict[type[nn.Module], dict[str, Reader]] = {
    # Users give layers other weights, and what is computed is up to these.
    nn.Linear: {
        "in_features": lambda module: module.weight.shape[1],
        "out_features": lambda module: module.weight.shape[0],
    },
    nn.RNNBase: {"bias": lambda module: module.bias},
    nn.RNNCellBase: {"bias": lambda module: module.bias},
    nn.MultiheadAttention: {
        "bias": lambda module: module.in_proj_bias is not None,
        "add_bias_kv": lambda module: module.bias_k is not None,
    },
    nn.TransformerEncoderLayer: _LAYER_READERS,
    nn.TransformerDecoderLayer: _LAYER_READERS,
    nn.Module: {
        "bias": _has_bias,
        "weight": lambda module: None,
        "pos_weight": lambda module: None,
        "process_group": lambda module: None,
    },
}


@cache
def torch_classes() -> dict[str, type[nn.Module]]:
    """torch.nn's classes that a file may hold, by their importable names."""
    own = (nn.modules.linear.NonDynamicallyQuantizableLinear,)
    classes = [*(getattr(nn, name) for name in CLASS_NAMES if hasattr(nn, name)), *own]
    return {f"{cls.__module__}.{cls.__qualname__}": cls for cls in classes}


def left_out(cls: type[nn.Module]) -> str | None:
    """Why a file may not hold a class of torch.nn; None for other classes."""
    return UNSUPPORTED_CLASSES.get(cls.__name__) if cls.__module__.startswith("torch.nn.") else None


def argument_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """The names of the constructor's arguments that are saved."""
    if cls not in _ARGUMENTS:
        names = inspect.signature(cls).parameters
        _ARGUMENTS[cls] = tuple(name for name in names if name not in _UNSAVED_ARGUMENTS)
    return _ARGUMENTS[cls]


def read_argument(module: nn.Module, name: str) -> Any:
    """What to give the constructor as `name` to make `module` again."""
    for cls, readers in READERS.items():
        if isinstance(module, cls) and name in readers:
            return _plain(readers[name](module))
    return _plain(getattr(module, name))


def _plain(value: Any) -> Any:
    """Sizes as a tuple, whatever sequence the user gave."""
    if isinstance(value, torch.Size | list):
        return tuple(value)
    return value


def fits(name: str, value: Any) -> bool:
    """Whether `value` has the type and range of the argument called `name`."""
    kind = KINDS.get(name)
    return kind is not None and kind(value)
