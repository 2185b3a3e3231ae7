"""Options that several commands share, and how they become a `QuantConfig`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fxquant.config.quant_config import ZERO_POINTS, QuantConfig, as_config
from fxquant.config.targets import TARGETS
from fxquant.numerics.code_books import CODE_BOOKS
from fxquant.numerics.integers import WIDTHS

MODEL_HELP = """
MODEL is one of

\b
  package.module:function    a function without arguments that returns the model
  path/to/file.py:function   the same in a file
  FOLDER                     a Hugging Face checkpoint (needs transformers)
  FILE.safetensors           what fxquant saved
"""
DATA_HELP = """Calibration batches: package.module:function or file.py:function, a function that
returns them; a .npy or .safetensors file of inputs, whose first dimension is split into batches;
or, for a folder, a text file, which its tokenizer reads."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
data_option = click.option("--data", metavar="SOURCE", help=DATA_HELP)
bits_option = click.option(
    "--bits",
    type=click.Choice([str(bits) for bits in WIDTHS]),
    help="Bits of a weight.  [default: 4]",
)
group_option = click.option(
    "--group-size",
    type=int,
    metavar="N",
    help="Weights that share a scale; -1: all of a row.  [default: 128]",
)
memory_option = click.option(
    "--memory",
    metavar="AMOUNT",
    help="For values between layers, such as 4GB; more waits in a file. [default: half the free]",
)

_RULES = (
    click.option("--config", metavar="RECIPE", help="A preset (w4a16, w4a8, w8a8) or a recipe file "
                 "(.toml) with the fields of QuantConfig; the options below change it."),
    bits_option,
    click.option("--embeddings", type=click.Choice([str(bits) for bits in WIDTHS]),
                 help="Bits of embeddings and of heads tied to them.  [default: float]"),
    group_option,
    click.option("--asymmetric", is_flag=True, help="A zero point for each group."),
    click.option("--zero-points", type=click.Choice(ZERO_POINTS),
                 help="Of asymmetric weights; other formats need integers.  [default: float]"),
    click.option("--code-book", type=click.Choice(list(CODE_BOOKS)),
                 help="16 levels of weights of 4 bits in the place of integers.  [default: none]"),
    click.option("--target", type=click.Choice(list(TARGETS)),
                 help="A format that the model will be exported to: keep to what it holds."),
    click.option("--method", metavar="NAME", help="rtn, hqq, gptq, awq, smoothquant, some joined "
                 "by +, best or auto.  [default: auto]"),
    click.option("--observer", metavar="NAME", help="What finds the ranges of activations: minmax, "
                 "movingaverage, histogram, auto or dynamic.  [default: minmax]"),
    click.option("--activation-bits", type=click.Choice(["8"]), help="Quantize activations, too."),
    click.option("--activation-products", is_flag=True, default=None,
                 help="With --activation-bits: the factors of attention's products, too."),
    click.option("--keep-float", multiple=True, metavar="NAME",
                 help="A name, parent, glob or re:… that stays float; may be repeated."),
    click.option("--skip-param-threshold", type=int, metavar="N",
                 help="Layers with fewer parameters stay float.  [default: 1024]"),
    click.option("--samples", type=int, metavar="N",
                 help="Calibration samples used at most.  [default: 150, of short texts as many as "
                 "have 30,000 tokens]"),
    click.option("--token-noise", type=float, metavar="SHARE",
                 help="Fit layers to copies of the batches besides, with this share of the tokens "
                 "drawn at random.  [default: 0]"),
    click.option("--fuse", is_flag=True, default=None,
                 help="Fuse the graph: fewer and larger steps, which are faster on CPUs."),
)  # fmt: skip


def rule_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that decide what is quantized and how."""
    for option in reversed(_RULES):
        command = option(command)
    return command


def config_of(rules: dict[str, Any]) -> QuantConfig:
    """The config that the options of `rule_options` ask for.

    Raises:
        OptionError: a value is not usable.
    """
    numbers = {
        name: None if rules[name] is None else int(rules[name])
        for name in ("bits", "embeddings", "activation_bits")
    }
    given = {
        **numbers,
        "group_size": rules["group_size"],
        "symmetric": False if rules["asymmetric"] else None,
        "zero_points": rules["zero_points"],
        "code_book": rules["code_book"],
        "target": rules["target"],
        "method": rules["method"],
        "observer": rules["observer"],
        "activation_products": rules["activation_products"],
        "modules_to_not_convert": list(rules["keep_float"]) or None,
        "skip_param_threshold": rules["skip_param_threshold"],
        "num_calibration_samples": rules["samples"],
        "token_noise": rules["token_noise"],
        "fuse": rules["fuse"],
    }
    options = {name: value for name, value in given.items() if value is not None}
    return as_config(rules["config"], options)


def path_option(name: str, text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """An option that takes a path to write to."""
    return click.option(name, type=click.Path(path_type=Path), metavar="PATH", help=text)
