"""GGUF files, read by the library of llama.cpp."""

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import fxquant
from fxquant.exporters import gguf as exporter
from tests.exporters.conftest import IDS, SMALL
from tests.exporters.layers import int4_layer, quantized_layers, with_layers

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
HEADS = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}


def in_order_of_file(weight, heads):
    """As llama.cpp's converter orders the rows of a head: 0, n, 1, n + 1, …"""
    size = len(weight) // heads
    order = [h * size + part * size // 2 + i
             for h in range(heads) for i in range(size // 2) for part in range(2)]  # fmt: skip
    return weight[order]


@pytest.fixture(scope="module")
def base(int4, tmp_path_factory):
    """What llama.cpp's converter would make of the float model."""
    path = tmp_path_factory.mktemp("gguf") / "base.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    state = {name: t.numpy() for name, t in int4.model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output.weight", state["lm_head.weight"].astype(np.float16))
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    for name, own in NAMES.items():
        values = state[f"model.layers.0.{name}.weight"]
        values = in_order_of_file(values, HEADS[name]) if name in HEADS else values
        writer.add_tensor(f"blk.0.{own}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(path):
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def assert_same(path, model, kinds):
    found = tensors(path)
    for name, layer in quantized_layers(model).items():
        part = name.removeprefix("model.layers.0.")
        own = found["output.weight" if part == "lm_head" else f"blk.0.{NAMES[part]}.weight"]
        assert own.tensor_type.name == kinds.get(part, kinds[""])
        expected = layer.dequantize().numpy()
        if part in HEADS:
            expected = in_order_of_file(expected, HEADS[part])
        assert np.array_equal(gguf.dequantize(own.data, own.tensor_type), expected)


def test_blocks_take_the_place_of_weights(int4, base, tmp_path):
    fxquant.export(int4.graph, tmp_path / "new.gguf", format="gguf", base=base)
    assert_same(tmp_path / "new.gguf", int4.graph, {"": "Q4_0"})
    before, after = tensors(base), tensors(tmp_path / "new.gguf")
    assert list(before) == list(after)
    assert np.array_equal(before["output.weight"].data, after["output.weight"].data)
    fields = gguf.GGUFReader(tmp_path / "new.gguf").fields
    assert fields["llama.attention.head_count_kv"].contents() == 2
    assert fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]


def test_layers_of_8_bits_are_q8_0(mixed, base, tmp_path):
    fxquant.export(mixed.graph, tmp_path / "new.gguf", format="gguf", base=base)
    kinds = {"": "Q4_0", "mlp.down_proj": "Q8_0", "lm_head": "Q8_0"}
    assert_same(tmp_path / "new.gguf", mixed.graph, kinds)


def test_larger_groups_repeat_their_scale(int4, base, tmp_path):
    graph, _ = fxquant.quantize(int4.model, example_inputs=IDS, group_size=64, target="gguf")
    fxquant.export(graph, tmp_path / "new.gguf", format="gguf", base=base)
    assert_same(tmp_path / "new.gguf", graph, {"": "Q4_0"})


def test_whole_zero_points_are_q4_1_if_their_products_are_exact():
    def zeros(shape):
        return torch.full(shape, 4.0)

    layer = exporter.integer_layer(int4_layer(8, 64, zero_points=zeros))
    kind, blocks = exporter.packed_blocks(layer)
    assert kind == "Q4_1"
    found = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1)
    assert np.array_equal(found, exporter._weight(layer))


def test_what_the_format_cannot_hold_is_refused(int4, base, tmp_path):
    def findings(model, **options):
        return " ".join(map(str, fxquant.check_export(model, "gguf", **options)))

    fractional, _ = fxquant.quantize(int4.model, example_inputs=IDS, group_size=32, symmetric=False)
    assert "scale times zero point is no float16" in findings(fractional)
    model = fxquant.swap_modules(int4.model, int4.graph)
    with_layers(model, lambda o, i: int4_layer(o, i, group_size=16))
    assert "a multiple of 32" in findings(model)
    with_layers(model, int4_layer)  # other weights than those of base
    assert "base has another weight there" in findings(model, base=base)
    data = fxquant.quantize(
        int4.model, [IDS], method="awq+rtn", group_size=32, accuracy_warning="ignore"
    )[0]
    text = findings(data, base=base)
    assert "calibration gave it a bias" in text
    with pytest.raises(fxquant.OptionError, match=r"base.*convert_hf_to_gguf"):
        fxquant.export(int4.graph, tmp_path / "x.gguf", format="gguf")
    with pytest.raises(fxquant.OptionError, match="cannot be read"):
        fxquant.check_export(int4.graph, "gguf", base=tmp_path / "no.gguf")
    with pytest.raises(fxquant.OptionError, match=r"symmetric.*cannot hold zero points"):
        fxquant.QuantConfig(target="gguf", symmetric=False)
    deep = LlamaForCausalLM(type(SMALL).from_dict({**SMALL.to_dict(), "num_hidden_layers": 2}))
    graph, _ = fxquant.quantize(deep.eval(), example_inputs=IDS, group_size=32)
    assert "base has no tensor" in findings(graph, base=base)
    assert list(tmp_path.iterdir()) == []


def test_files_that_read_back_differently_are_not_put_in_place(int4, base, tmp_path, monkeypatch):
    right = exporter.packed_blocks

    def wrong(layer):
        kind, blocks = right(layer)
        return kind, blocks ^ 16

    monkeypatch.setattr(exporter, "packed_blocks", wrong)
    with pytest.raises(fxquant.SaveError, match="other weights in the files"):
        fxquant.export(int4.graph, tmp_path / "new.gguf", format="gguf", base=base)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", ["int4", "mixed"])
def test_what_was_exported_comes_back_to_the_bit(source, base, tmp_path, request):
    made = request.getfixturevalue(source)
    fxquant.export(made.graph, tmp_path / "new.gguf", format="gguf", base=base)
    back = fxquant.load_checkpoint(tmp_path / "new.gguf", made.model)
    ours = quantized_layers(made.graph)
    assert set(quantized_layers(back)) == set(ours)
    for name, layer in quantized_layers(back).items():
        assert layer.bits == ours[name].bits
        assert torch.equal(layer.dequantize(), ours[name].dequantize())
    # Rows of 8 bits come back in groups of 32, whose sums are added in another order.
    assert fxquant.sqnr_db(made.graph(**IDS).logits, back(**IDS).logits) > 50
    assert type(made.model.get_submodule("model.layers.0.mlp.up_proj")) is torch.nn.Linear
    fxquant.export(back, tmp_path / "again.gguf", format="gguf", base=base)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "new.gguf").read_bytes()


def rewritten(base, path, kinds):
    """The base with weights in types that the library of llama.cpp makes of them."""
    reader, types = gguf.GGUFReader(base), gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    for tensor in reader.tensors:
        kind = next((types[k] for end, k in kinds.items() if tensor.name.endswith(end)), types.F32)
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_files_of_llama_cpp_are_read(int4, base, tmp_path):
    kinds = {"attn_q.weight": "Q4_0", "attn_k.weight": "Q4_1", "up.weight": "Q8_0",
             "down.weight": "Q5_0"}  # fmt: skip
    rewritten(base, tmp_path / "q.gguf", kinds)
    with pytest.warns(fxquant.RoundedScalesWarning, match="3 layers have scales with more digits"):
        back = fxquant.load_checkpoint(tmp_path / "q.gguf", int4.model)
    found = tensors(tmp_path / "q.gguf")
    for part, own in NAMES.items():
        expected = gguf.dequantize(*(getattr(found[f"blk.0.{own}.weight"], key)
                                     for key in ("data", "tensor_type")))  # fmt: skip
        layer = back.get_submodule(f"model.layers.0.{part}")
        weight = layer.weight.detach().float()
        if part in HEADS:
            weight = in_order_of_file(weight, HEADS[part])
        assert fxquant.sqnr_db(torch.from_numpy(expected.copy()), weight) > 45, part
    assert {layer.bits for layer in quantized_layers(back).values()} == {4, 8}
    assert len(quantized_layers(back)) == 3  # Q5_0 became its float values


def test_another_model_or_none_is_refused(int4, base, tmp_path):
    fxquant.export(int4.graph, tmp_path / "new.gguf", format="gguf", base=base)
    with pytest.raises(fxquant.OptionError, match="model=: its weights tell in which order"):
        fxquant.load_checkpoint(tmp_path / "new.gguf")
    torch.manual_seed(1)
    other = LlamaForCausalLM(SMALL)
    with pytest.raises(fxquant.LoadError, match="another weight in the file than in the model"):
        fxquant.load_checkpoint(tmp_path / "new.gguf", other)
    with pytest.raises(fxquant.LoadError, match="no layer of the model in Q4_0"):
        fxquant.load_checkpoint(base, int4.model)
