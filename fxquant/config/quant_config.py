"""What the caller wants, as one value that is checked when it is made."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypedDict

from fxquant.config.method import parse_method
from fxquant.config.option_checks import (
    FLOAT_BITS,
    TypeRule,
    check_activation_bits,
    check_bits,
    check_code_book_fits,
    check_embeddings,
    check_flag,
    check_not_fused,
    check_parameter_threshold,
    check_share,
    checked_names,
    checked_types,
)
from fxquant.config.skip_rules import (
    QUANTIZABLE_TYPES,
    is_type_match,
    type_name,
)
from fxquant.config.targets import TARGETS, Target
from fxquant.errors import (
    OptionError,
    check_choice,
    check_number,
    check_positive_int,
    check_type,
    near_misses,
)
from fxquant.numerics.code_books import CODE_BITS
from fxquant.numerics.quantized_weight import check_group_size

DYNAMIC = "dynamic"  # instead of an observer: ranges are found while the model runs
OBSERVER_NAMES = ("minmax", "movingaverage", "ema", "histogram", "kl", "auto", DYNAMIC)
ON_FAILURE = ("error", "warn", "ignore")

ZERO_POINTS = ("float", "integer")

OnFailure = Literal["error", "warn", "ignore"]
ZeroPoints = Literal["float", "integer"]


class WeightForm(TypedDict):
    """How groups of a weight are quantized, as keywords of the rounding algorithms."""

    group_size: int
    symmetric: bool
    integer_zero_points: bool
    code_book: str | None


class QuantOptions(TypedDict, total=False):
    """The fields of `QuantConfig` as keywords, for editors and type checkers."""

    bits: int | Mapping[str, int]
    embeddings: int | None
    group_size: int
    symmetric: bool
    zero_points: ZeroPoints
    code_book: str | None
    target: str | None
    method: str
    observer: str
    activation_bits: int | None
    activation_products: bool
    layer_types: Sequence[TypeRule] | None
    modules_to_not_convert: Sequence[str] | None
    skip_layer_types: Sequence[TypeRule] | None
    skip_layer_names: Sequence[str] | None
    skip_param_threshold: int | None
    num_calibration_samples: int | None
    token_noise: float
    fuse: bool
    accuracy_warning: OnFailure
    sqnr_warning_threshold: float
    sqnr_error_threshold: float


@dataclass(frozen=True)
class QuantConfig:
    """How to quantize a model: a value that can be compared, saved and used again.

    Attributes:
        bits: 2, 3, 4, 5, 6, 8, or a mapping from module name (or name rule) to bits; 16 leaves it
            float. 8 has one scale a row, whatever `group_size` says.
        embeddings: bits of the rows of embeddings, 2 to 8, and of heads that are tied to them. None
            leaves them float, unless `bits` names them.
        group_size: weights along `in_features` that share a scale; -1: all of a row. A layer with
            fewer inputs gets 8 bits.
        symmetric: one fixed zero point, or one for each group.
        zero_points: `"float"`: those of asymmetric weights may have fractions, which is more
            accurate; `"integer"`: whole numbers, which other formats need.
        code_book: `"nf4"`: a weight of 4 bits has 16 levels that lie closer to each other near
            zero, where most of it is, in the place of 16 integers, at the same size. Weights of
            other widths have integers. None: all have. See the page on accuracy for where it pays.
        target: a format that the model will be exported to (see `export`): what it cannot hold is
            then avoided. Zero points are whole, scales stay in its range, no layer gets a bias
            that its class has no place for, and a layer that it cannot hold stays float.
        method: how to choose the integers: `"rtn"` (rounding to nearest, with a clip search
            weighted by the data), `"hqq"` (half-quadratic, without data), `"gptq"` (fitted to the
            data, layer by layer); `"awq"` or `"smoothquant"` (channel scales folded into the
            graph, then `"rtn"`); some of these joined by `+`, as in `"smoothquant+gptq"`;
            `"best"` (`"gptq"`, then refined); or `"auto"`, which is `"gptq"` with data and `"rtn"`
            without.
        observer: the observer of activations, a name that `create_observer` knows, or
            `"dynamic"`: with `activation_bits=8`, ranges are found while the model runs, one for
            each token and group; for convolutions over several places one for each sample.
        activation_bits: 8 quantizes the inputs of quantized layers: by quantize/dequantize nodes
            in the graph (for linear layers a range for each channel, within the one that the
            observer gives the value; for others that one), or inside the layers if
            `observer="dynamic"` or without data. The decisions say which arithmetic runs. None
            leaves them float.
        activation_products: with `activation_bits=8`, round both factors of products of two
            values, too, such as the scores of attention, whether they are computed by `matmul`,
            `bmm`, `einsum` or `scaled_dot_product_attention`. The rounded values are multiplied as
            floats, so this tells what such products would cost in integers, and `"onnx"` files hold
            the static ranges for runtimes that have them; here it saves no time.
        layer_types: quantize only these classes.
        modules_to_not_convert: names that stay float, on top of the skip rules.
        skip_layer_types: replaces `DEFAULT_INT4_SKIP.skip_types`.
        skip_layer_names: replaces `DEFAULT_INT4_SKIP.skip_names`.
        skip_param_threshold: replaces `DEFAULT_INT4_SKIP.skip_param_threshold`.
        num_calibration_samples: rows of the first dimension that are used at most. None uses 150,
            and of short texts as many as have 30,000 tokens.
        token_noise: from 0 to 1; above 0, layers are fitted to a copy of every fourth batch, too,
            in which this share of the tokens is drawn at random from the vocabulary. What is fitted
            to one kind of text then holds better on others; calibration takes a quarter longer.
        fuse: whether the graph is fused in the end (see `fxquant.fuse`): it computes the same in
            fewer and larger steps, within the rounding of its dtype. What needs the graph as the
            model has it, bit for bit (`swap_modules`, `into="model"`, other formats), then refuses
            it; therefore False, unless you ask for it.
        accuracy_warning: `"warn"`, `"error"` or `"ignore"`.
        sqnr_warning_threshold: SQNR below it, in dB, is reported as low.
        sqnr_error_threshold: SQNR below it, in dB, is reported as critical.

    Raises:
        OptionError: a value is not usable; the text names the option and what it takes.

    >>> QuantConfig(bits=8) == QuantConfig.from_dict(QuantConfig(bits=8).to_dict())
    True
    >>> QuantConfig.preset("w4a8", group_size=64).activation_bits
    8
    """

    bits: int | Mapping[str, int] = 4
    embeddings: int | None = None
    group_size: int = 128
    symmetric: bool = True
    zero_points: str = "float"
    code_book: str | None = None
    target: str | None = None
    method: str = "auto"
    observer: str = "minmax"
    activation_bits: int | None = None
    activation_products: bool = False
    layer_types: Sequence[TypeRule] | None = None
    modules_to_not_convert: Sequence[str] | None = None
    skip_layer_types: Sequence[TypeRule] | None = None
    skip_layer_names: Sequence[str] | None = None
    skip_param_threshold: int | None = None
    num_calibration_samples: int | None = None
    token_noise: float = 0.0
    fuse: bool = False
    accuracy_warning: str = "warn"
    sqnr_warning_threshold: float = 20.0
    sqnr_error_threshold: float = 10.0

    def __post_init__(self) -> None:
        if isinstance(self.bits, Mapping):
            self._set("bits", MappingProxyType(dict(self.bits)))
        for name in ("modules_to_not_convert", "skip_layer_names"):
            self._set(name, checked_names(name, getattr(self, name)))
        for name in ("layer_types", "skip_layer_types"):
            self._set(name, checked_types(name, getattr(self, name)))
        check_bits(self.bits)
        check_embeddings(self.embeddings)
        check_group_size(self.group_size)
        if self.num_calibration_samples is not None:
            check_positive_int("num_calibration_samples", self.num_calibration_samples)
        check_share("token_noise", self.token_noise)
        check_flag("symmetric", self.symmetric)
        check_flag("fuse", self.fuse)
        check_choice("zero_points", self.zero_points, ZERO_POINTS)
        check_code_book_fits(self.code_book, self.bits, self.embeddings, self.symmetric)
        parse_method(self.method, has_data=True)
        check_choice("observer", self.observer, OBSERVER_NAMES)
        check_choice("accuracy_warning", self.accuracy_warning, ON_FAILURE)
        check_number("sqnr_warning_threshold", self.sqnr_warning_threshold)
        check_number("sqnr_error_threshold", self.sqnr_error_threshold)
        check_activation_bits(self.activation_bits)
        check_flag("activation_products", self.activation_products)
        if self.activation_products and self.activation_bits is None:
            raise OptionError(
                "activation_products",
                found="True without activation_bits",
                needed="activation_bits=8, which says how they are rounded",
                remedy="Pass activation_bits=8 too, or leave activation_products out.",
            )
        check_parameter_threshold(self.skip_param_threshold)
        if self.target is not None:
            check_choice("target", self.target, TARGETS)
            self._keep_to(TARGETS[self.target])
        for kind in self.layer_types or ():
            if not any(is_type_match(kind, layer) for layer in QUANTIZABLE_TYPES):
                raise OptionError(
                    "layer_types",
                    found=str(kind),
                    needed="a type whose weight can be quantized: "
                    + ", ".join(map(type_name, QUANTIZABLE_TYPES)),
                    remedy="Leave layer_types out to quantize all of them.",
                )

    def __hash__(self) -> int:
        return hash(repr(sorted(self.to_dict().items())))

    def __reduce__(self) -> tuple[Any, ...]:
        return QuantConfig.from_dict, (self.to_dict(),)

    def _keep_to(self, target: Target) -> None:
        """Refuse what a format cannot hold at all, and take whole zero points."""
        check_not_fused(self.fuse, f"the target {target.name!r}")
        widths = self.bits.values() if isinstance(self.bits, Mapping) else [self.bits]
        unknown = sorted(set(widths) - {*target.widths, FLOAT_BITS})
        if unknown:
            raise OptionError(
                "bits",
                found=f"{unknown[0]} for the target {target.name!r}",
                needed=f"one of {', '.join(map(str, target.widths))}",
                remedy="Choose one of these widths, or leave the target out.",
            )
        kind = DYNAMIC if self.observer == DYNAMIC else "static"
        if self.activation_bits is not None and kind not in target.activations:
            raise OptionError(
                "activation_bits",
                found=f"{self.activation_bits} bits with {kind} ranges for target {target.name!r}",
                needed=f"float activations, or ranges that are {target.activations[0]}"
                if target.activations
                else "None: the format has float activations",
                remedy="Leave activation_bits out, or choose another target.",
            )
        if not self.symmetric and not target.has_zero_points:
            raise OptionError(
                "symmetric",
                found=f"False for the target {target.name!r}",
                needed="True: the format cannot hold zero points exactly",
                remedy="Leave symmetric out, or choose another target.",
            )
        if self.code_book is not None:
            raise OptionError(
                "code_book",
                found=f"{self.code_book!r} for the target {target.name!r}",
                needed="None: the format holds integers",
                remedy="Leave code_book out, or choose another target.",
            )
        self._set("zero_points", "integer")

    def form(self, bits: int) -> WeightForm:
        """What a rounding algorithm takes besides a weight and its `bits`."""
        return {
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "integer_zero_points": self.zero_points == "integer",
            "code_book": self.code_book if bits == CODE_BITS else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON or TOML; what is left at None is left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if isinstance(self.bits, Mapping):
            values["bits"] = dict(self.bits)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "QuantConfig":
        """Make a config of plain data.

        Args:
            data: values by field name; `preset` names one that the others change.

        Raises:
            OptionError: a name or a value is not usable.
        """
        check_type("config", data, Mapping, "Pass what to_dict returned.")
        values = dict(data)
        preset = values.pop("preset", None)
        check_option_names(values)
        return cls(**values) if preset is None else cls.preset(preset, **values)

    @classmethod
    def from_toml(cls, path: str | Path) -> "QuantConfig":
        """Read a recipe: a TOML file with the fields of this class, and perhaps `preset`.

        Raises:
            OptionError: the file cannot be read, or a name or a value in it is not usable.
        """
        try:
            data = tomllib.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise OptionError(
                f"recipe {str(path)!r}",
                found=f"a file that cannot be read: {error}",
                needed="a TOML file with the fields of QuantConfig",
                remedy="Write lines such as: bits = 4",
            ) from error
        return cls.from_dict(data)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "QuantConfig":
        """A config by name, with some of its values changed.

        Args:
            name: `"w4a16"` (weights of 4 bits, float activations), `"w4a8"` or `"w8a8"`
                (activations of 8 bits, with ranges that are found while the model runs).
            **changes: fields and their values.

        Raises:
            OptionError: the name or a value is not usable.
        """
        check_choice("preset", name, PRESETS)
        check_option_names(changes)
        return cls(**{**PRESETS[name], **changes})

    def changed(self, **changes: Any) -> "QuantConfig":
        """The same config with other values.

        Raises:
            OptionError: a name or a value is not usable.
        """
        check_option_names(changes)
        return replace(self, **changes)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


PRESETS: dict[str, dict[str, Any]] = {
    "w4a16": {"bits": 4},
    "w4a8": {"bits": 4, "activation_bits": 8, "observer": DYNAMIC},
    "w8a8": {"bits": 8, "activation_bits": 8, "observer": DYNAMIC},
}


def as_config(
    config: "QuantConfig | Mapping[str, Any] | str | Path | None", options: Mapping[str, Any]
) -> QuantConfig:
    """The config that a caller means.

    Args:
        config: a config, plain data, the name of a preset, the path of a recipe, or None for the
            defaults.
        options: fields that the caller gave one by one; they change `config`.

    Raises:
        OptionError: a name or a value is not usable.
    """
    if isinstance(config, str) and not config.endswith(".toml"):
        return QuantConfig.preset(config, **options)
    if isinstance(config, str | Path):
        config = QuantConfig.from_toml(config)
    elif isinstance(config, Mapping):
        config = QuantConfig.from_dict(config)
    elif config is None:
        config = QuantConfig()
    if not isinstance(config, QuantConfig):
        raise OptionError(
            "config",
            found=f"a {type(config).__name__}",
            needed="a QuantConfig, the name of a preset, or the path of a recipe (.toml)",
            remedy="Write QuantConfig(bits=4), for example.",
        )
    return config.changed(**options) if options else config


def check_option_names(options: Mapping[str, Any]) -> None:
    """Raise an `OptionError` with the near miss if a name is no field of `QuantConfig`."""
    known = [field.name for field in fields(QuantConfig)]
    for name in options:
        if name not in known:
            close = near_misses(str(name), known, count=1)
            raise OptionError(
                f"option {name!r}",
                found="no option of that name",
                needed=f"one of {', '.join(known)}",
                remedy=f"Did you mean {close[0]!r}?" if close else "Leave it out.",
            )
