"""LoRA of PEFT on quantized layers: trained, saved, merged, or refused in words."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import fxquant
import fxquant.integrations.transformers  # registers the quantizer
from fxquant.integrations.peft import MergeLossWarning
from fxquant.integrations.peft.lora_linear import QuantizedLoraLinear
from tests.integrations import models

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.usefixtures("float32_products"),
]
LOSSY = pytest.mark.filterwarnings("ignore::fxquant.integrations.peft.MergeLossWarning")
X = torch.randn(16, 64)


class Small(nn.Module):
    """Nothing of transformers: a table, two layers of different widths, and a float head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 64)
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.head = nn.Linear(64, 8)

    def forward(self, x):
        return self.head(
            self.second(torch.relu(self.first(x))) + self.table(torch.zeros(len(x)).long())
        )


BITS = {"first": 4, "second": 8, "table": 16, "head": 16}
QUANTIZED = ["first", "second"]


def small(**options):
    torch.manual_seed(0)
    options = {"bits": BITS, "group_size": 32, **options}
    return fxquant.quantize(
        Small().eval(), example_inputs=X, into="model", **options, **models.QUIET
    )[0]


def adapted(model, **options):
    return get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": "all-linear", **options}))


def train(model, steps=5):
    """A few steps away from what the model gives, in the mode of training."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(steps):
        loss = (model.train()(X) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def sqnr(expected, found):
    return fxquant.sqnr_db(expected, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_learn_while_the_integers_stay(dtype):
    base = small().to(dtype)
    weights = {n: layer.quantized_weight for n, layer in models.layers(base).items()}
    model = adapted(base)
    x = X.to(dtype)
    assert torch.equal(model(x), base(x))
    loss = (model(x) - 1).square().mean()
    loss.backward()
    wrapped = {n: m for n, m in base.named_modules() if isinstance(m, QuantizedLoraLinear)}
    assert wrapped.keys() == {"first", "second"}
    for layer in wrapped.values():
        assert layer.lora_B["default"].weight.grad.abs().sum() > 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert (model(x) - 1).square().mean() < loss
    for name, layer in wrapped.items():
        assert torch.equal(layer.base_layer.quantized_weight.packed, weights[name].packed)


def test_the_gradients_are_those_of_the_dequantized_layers():
    base = small()
    plain = copy.deepcopy(base)
    for name, layer in models.layers(base).items():
        setattr(plain, name, layer.to_float())
    ours, theirs = adapted(base), adapted(plain)
    theirs.load_state_dict(
        {k: v for k, v in ours.state_dict().items() if "lora_" in k}, strict=False
    )
    for model in (ours, theirs):
        model(X).square().mean().backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if "lora_B" in n}
    found = {n: p.grad for n, p in ours.named_parameters() if "lora_B" in n}
    assert found.keys() == expected.keys() != set()
    for name, grad in found.items():
        assert torch.allclose(grad, expected[name], rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("swapped")
    models.swapped(models.llama()).save_pretrained(made)
    return made


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def with_random_updates(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def test_a_saved_adapter_is_loaded_onto_a_model_from_a_folder(folder, tmp_path):
    model = with_random_updates(adapted(loaded(folder), task_type=TaskType.CAUSAL_LM))
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model*"))
    base = loaded(folder)
    before = models.logits(base)
    again = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(models.logits(again), models.logits(model))
    assert sqnr(models.logits(model), before) < 40
    tokens = again.generate(**models.IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert tokens.shape == (2, 19)
    with again.disable_adapter():
        assert torch.equal(models.logits(again), before)


@LOSSY
def test_an_adapter_that_transformers_adds_itself(folder, tmp_path):
    model = loaded(folder)  # a recipe for transposed float weights:
    model.add_adapter(LoraConfig(r=4, target_modules=["down_proj"], fan_in_fan_out=True))
    layer = with_random_updates(model).model.layers[0].mlp.down_proj
    assert isinstance(layer, QuantizedLoraLinear)
    expected = models.logits(model)
    layer.merge()
    assert sqnr(expected, models.logits(model)) > 20
    layer.unmerge()
    model.save_pretrained(tmp_path)
    again = loaded(folder)
    again.load_adapter(str(tmp_path))
    assert torch.equal(models.logits(again), expected)


@LOSSY
@pytest.mark.parametrize("activation", ["float", "int8"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_merged_adapter_is_a_quantized_layer_and_unmerging_gives_the_old_one(
    symmetric, activation, tmp_path
):
    base = small(symmetric=symmetric)
    for layer in models.layers(base).values():
        layer.activation = activation
    model = train(adapted(base, target_modules=QUANTIZED))
    trained = model(X)
    with model.disable_adapter():
        before = model(X)
    model.merge_adapter()
    assert sqnr(trained, model(X)) > sqnr(trained, before) + 10
    assert base.second.merge_loss < 0.1 < base.first.merge_loss < 0.5  # of 8 bits, and of 4
    for layer in (base.first.base_layer, base.second.base_layer):
        assert (layer.activation, layer.training) == (activation, False)
    model.unmerge_adapter()
    assert torch.equal(model(X), trained)
    merged = model.merge_and_unload()
    assert {n: (m.bits, m.symmetric) for n, m in models.layers(merged).items()} == {
        "first": (4, symmetric), "second": (8, True),
    }  # fmt: skip


@LOSSY
def test_two_adapters_are_merged_as_one_update():
    model = train(adapted(small(), target_modules=QUANTIZED))
    model.add_adapter("other", LoraConfig(r=2, target_modules=QUANTIZED))
    model.set_adapter("other")
    train(model)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["other"])
    at_once = copy.deepcopy(model)
    at_once.unmerge_adapter()
    at_once.merge_adapter(["default", "other"])
    assert torch.equal(at_once(X), model(X))
    model.unmerge_adapter()
    at_once.unmerge_adapter()
    assert torch.equal(at_once(X), model(X))


@LOSSY
def test_a_merged_model_is_saved_and_loaded_with_the_same_bits(folder, tmp_path):
    merged = with_random_updates(adapted(loaded(folder))).merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert torch.equal(models.logits(loaded(tmp_path)), models.logits(merged))


def test_an_update_that_rounding_takes_away_is_warned_of():
    model = adapted(small())
    layer = model.base_model.model.first
    nn.init.constant_(layer.lora_B["default"].weight, 1e-5)
    before = layer.base_layer.quantized_weight.packed
    with pytest.warns(MergeLossWarning, match="layer of 4 bits, and a tenth or more"):
        layer.merge()
    assert layer.merge_loss == pytest.approx(1, rel=1e-3)
    assert torch.equal(layer.base_layer.quantized_weight.packed, before)


def test_merging_a_head_leaves_the_embedding_that_it_is_tied_to():
    swapped = models.swapped(models.llama(tied=True), bits=8, embeddings=8, skip_layer_names=[])
    assert swapped.lm_head is swapped.model.embed_tokens.table
    before = models.layers(swapped)["model.embed_tokens"].dequantize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of tied weights
        model = adapted(swapped, target_modules=["lm_head"])
        expected = models.logits(with_random_updates(model))
        merged = model.merge_and_unload()
    assert sqnr(expected, models.logits(merged)) > 20
    assert torch.equal(merged.model.embed_tokens.dequantize(), before)


REFUSED = {
    "dora": ({"use_dora": True}, "use_dora"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa'"),
    "a quantized embedding": ({"target_modules": ["table"]}, "table, a QuantizedEmbedding"),
    "its rows": ({"trainable_token_indices": {"table": [0]}}, "a quantized embedding, whose"),
    "a layer to save": ({"modules_to_save": ["first"]}, r"modules_to_not_convert=\['first'\]"),
    "biases": ({"bias": "all"}, "'all'; the biases of quantized layers"),
}


@pytest.mark.parametrize(("options", "text"), REFUSED.values(), ids=REFUSED)
def test_what_could_not_be_trained_is_refused(options, text):
    with pytest.raises(fxquant.OptionError, match=text):
        adapted(small(bits={**BITS, "table": 8}), **options)


@LOSSY
def test_what_cannot_be_merged_is_refused():
    model = adapted(small(), lora_bias=True, target_modules=["first"])
    layer = model.base_model.model.first
    nn.init.normal_(layer.lora_B["default"].bias)
    expected = model(X)
    layer.merge()
    assert sqnr(expected, model(X)) > 20  # its layer has a bias
    layer.unmerge()
    layer.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(fxquant.OptionError, match="hooks"):
        layer.merge()
    with pytest.warns(UserWarning, match="merging LoRA weights won't be possible"):
        model = adapted(small(), lora_bias=True, target_modules=["second"])
    with pytest.raises(fxquant.OptionError, match="without lora_bias=True"):
        model.merge_adapter()


def test_float_models_get_the_adapters_of_peft():
    model = adapted(Small())
    kinds = {type(m).__module__ for m in model.modules() if hasattr(m, "lora_A")}
    assert kinds == {"peft.tuners.lora.layer"}
