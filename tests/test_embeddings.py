"""Embeddings and tied heads from the option to the file."""

import copy

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import OptionError, WeightError
from fxquant.measure.sizes import model_bytes


class Language(nn.Module):
    def __init__(self, *, tied, entries=300, width=128):
        super().__init__()
        self.embedding = nn.Embedding(entries, width)
        self.fc = nn.Linear(width, width)
        self.lm_head = nn.Linear(width, entries, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.lm_head(torch.tanh(self.fc(self.embedding(tokens))))


DATA = [
    torch.randint(0, 300, (8, 12), generator=torch.Generator().manual_seed(i)) for i in range(8)
]


def quantize(model, **options):
    return fxquant.quantize(model, DATA, accuracy_warning="ignore", **options)


def actions(info):
    return {d.module: d.action for d in info.decisions}


def test_embeddings_stay_float_unless_asked_for():
    _, info = quantize(Language(tied=True))
    assert actions(info) == {"embedding": "float", "fc": "int4", "lm_head": "float"}


@pytest.mark.parametrize("method", ["rtn", "gptq", "hqq", "best"])
def test_a_tied_head_reads_the_packed_weight_of_the_embedding(method, tmp_path):
    model = Language(tied=True)
    qmodel, info = quantize(model, embeddings=8, method=method)
    assert actions(info) == {"embedding": "int8", "fc": "int4", "lm_head": "int8"}
    assert "packed weight of embedding" in info.decisions[-1].reason
    assert qmodel.embedding.table is qmodel.lm_head
    assert model_bytes(qmodel) < 300 * 128 * 1.1 + 128 * 128
    path = tmp_path / "model.safetensors"
    fxquant.save_model(qmodel, path, info)
    assert path.stat().st_size < 300 * 128 * 1.1 + 128 * 128 + 10_000
    loaded = fxquant.load_model(path)
    assert loaded.embedding.table is loaded.lm_head
    swapped = fxquant.swap_modules(model, qmodel)
    assert swapped.embedding.table is swapped.lm_head
    moved = copy.deepcopy(qmodel)
    assert moved.embedding.table is moved.lm_head
    for other in (loaded, swapped, moved):
        assert torch.equal(other(DATA[0]), qmodel(DATA[0]))
    floats = fxquant.dequantize_model(qmodel)
    assert isinstance(floats.embedding, nn.Embedding)
    assert fxquant.sqnr_db(floats(DATA[0]), qmodel(DATA[0])) > 30


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_every_width_is_smaller_and_near(bits):
    qmodel, info = quantize(Language(tied=False), embeddings=bits, method="rtn")
    assert actions(info)["embedding"] == f"int{bits}"
    row = next(r for r in info.rows if r.module == "embedding")
    assert row.introduced_sqnr_db == pytest.approx(row.weight_sqnr_db, abs=2)
    assert row.weight_sqnr_db > 5.5 * bits - 7
    assert fxquant.diff(fxquant.trace(Language(tied=False)), qmodel).counts["rewritten"] >= 2


def test_a_mapping_names_embeddings_and_heads_and_patterns_do_not_mean_them():
    model = Language(tied=False)
    named = {"embedding": 4, "fc": 4, "lm_head": 8}
    assert actions(quantize(model, bits=named)[1]) == {
        "embedding": "int4", "fc": "int4", "lm_head": "int8",
    }  # fmt: skip
    assert actions(quantize(model, bits={"*": 4})[1]) == {
        "embedding": "float", "fc": "int4", "lm_head": "float",
    }  # fmt: skip


def test_what_the_caller_keeps_float_stays_float():
    model = Language(tied=True)
    _, info = quantize(model, embeddings=8, modules_to_not_convert=["lm_head"])
    assert actions(info) == {"embedding": "int8", "fc": "int4", "lm_head": "float"}
    _, info = quantize(model, embeddings=8, skip_layer_types=[nn.Embedding])
    assert actions(info)["embedding"] == "float"
    _, info = quantize(model, embeddings=4, layer_types=[nn.Embedding])
    assert actions(info) == {"embedding": "int4", "fc": "float", "lm_head": "float"}


def test_rows_narrower_than_a_group_get_int8():
    _, info = quantize(Language(tied=True, width=64), embeddings=4)
    assert actions(info) == dict.fromkeys(("embedding", "fc", "lm_head"), "int8")


@pytest.mark.parametrize("method", ["exact", "gradient"])
def test_sensitivity_measures_a_quantized_embedding(method):
    model = Language(tied=False)
    report = fxquant.sensitivity(
        model, DATA, method=method, rounding="rtn", embeddings=4, skip_layer_names=[]
    )
    rows = {row.module: row for row in report.rows}
    assert list(rows) == ["embedding", "fc", "lm_head"]
    assert 5 < rows["embedding"].output_sqnr_db < 40
    bits = fxquant.allocate(report, average_bits=6, choices=(4, 8))
    _, info = quantize(model, bits=bits, method="rtn")
    assert {name: f"int{b}" for name, b in bits.items()} == actions(info)


@pytest.mark.parametrize("bad", [1, 7, 16, True, 4.0, "8"])
def test_a_width_that_does_not_exist_is_refused(bad):
    with pytest.raises(OptionError, match="embeddings"):
        fxquant.QuantConfig(embeddings=bad)


def test_an_embedding_with_nan_is_named():
    model = Language(tied=False)
    model.embedding.weight.data[3, 4] = float("nan")
    with pytest.raises(WeightError, match=r"embedding\.weight"):
        quantize(model, embeddings=8)


def test_plan_says_the_same_without_touching_a_weight():
    info = fxquant.plan(Language(tied=True), embeddings=8)
    assert actions(info) == {"embedding": "int8", "fc": "int4", "lm_head": "int8"}
