"""A folder calibrated block by block: what quantize makes of the whole model, and the same bits
however little memory there is and however often it was interrupted."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import fxquant
from fxquant.cli.main import cli
from fxquant.errors import CalibrationError, OptionError, SaveError, WeightError
from fxquant.exporters.compressed_tensors import CompressedTensors
from fxquant.exporters.folder_reader import FolderReader
from fxquant.exporters.unfinished import UnfinishedFolder
from fxquant.graph.layers import sites
from tests.exporters.folders import digest

ROOT = Path(__file__).parents[2]
OPTIONS = {"group_size": 32, "accuracy_warning": "ignore"}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "vocab_size": 64}


def tokens(rows, length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 64, (rows, length), generator=generator)


def batches(padded=()):
    """Two batches of four rows; some rows, by number, are padded."""
    masks = torch.ones(2, 4, 24, dtype=torch.int64)
    masks[:, list(padded), 20:] = 0
    return [
        {"input_ids": tokens(4, 24, seed), "attention_mask": mask}
        for seed, mask in enumerate(masks)
    ]


def saved(model, folder):
    model.eval().save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**SIZES, num_hidden_layers=2, num_key_value_heads=1, tie_word_embeddings=True)
    ).eval()


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(**SIZES, num_hidden_layers=3)).eval()


@pytest.fixture(scope="module")
def source(encoder, tmp_path_factory):
    return saved(encoder, tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The encoder's new folder, made without interruption; and the record."""
    target = tmp_path_factory.mktemp("whole") / "new"
    return target, fxquant.quantize_checkpoint(source, target, OPTIONS, batches())


def weights(folder, names):
    """The weights of INT4 layers, as the files hold them."""
    reader = FolderReader(folder)
    return {name: CompressedTensors().read_layer(reader, name).weight() for name in names}


def filled(model, folder, names):
    """A copy of the model with the folder's weights and biases."""
    reader = FolderReader(folder)
    state = {**model.state_dict(), **{f"{n}.weight": w for n, w in weights(folder, names).items()}}
    state |= {name: reader.tensor(name) for name in state if name in reader.files}
    copy = type(model)(model.config).eval()
    copy.load_state_dict(state)
    return copy


def output_sqnr(model, other, calls):
    with torch.no_grad():
        pairs = [(model(**call).logits, other(**call).logits) for call in calls]
    expected, found = (
        torch.cat([x.flatten() for x in parts]) for parts in zip(*pairs, strict=True)
    )
    return fxquant.sqnr_db(expected, found)


# The last row is held out. transformers gives blocks no mask where a batch has no padding.
@pytest.mark.parametrize(("method", "padded"), [("gptq", []), ("rtn", [0])])
@pytest.mark.usefixtures("float32_products")
def test_a_decoder_gets_the_weights_that_quantize_gives_it(llama, tmp_path, method, padded):
    data = batches(padded)
    folder = saved(llama, tmp_path / "source")
    options = {**OPTIONS, "method": method}
    info = fxquant.quantize_checkpoint(folder, tmp_path / "new", options, data)
    qmodel, expected = fxquant.quantize(llama, data, options, target="compressed-tensors")
    assert len(info.selected_layers) == 14
    assert info.selected_layers == expected.selected_layers
    found = weights(tmp_path / "new", info.selected_layers)
    layers = {site.name: site.module for site in sites(qmodel)}
    same = [(found[name] == layers[name].dequantize()).float().mean() for name in found]
    assert min(same) > 0.99  # sums in another order may turn a tie
    assert info.method == method
    assert info.heldout_samples == expected.heldout_samples == 1
    assert info.sqnr_db == pytest.approx(expected.sqnr_db, abs=0.2)
    assert not list(tmp_path.glob("*.unfinished"))
    if method == "gptq":  # on other data it is better than what is made without data
        fxquant.quantize_checkpoint(folder, tmp_path / "plain", OPTIONS)
        fitted, plain = (
            output_sqnr(
                llama, filled(llama, tmp_path / made, found), [{"input_ids": tokens(8, 24, 7)}]
            )
            for made in ("new", "plain")
        )
        assert fitted > plain + 2


def test_copies_with_tokens_drawn_at_random_are_those_of_quantize(tmp_path):
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 256}  # of bytes at least, else they are no tokens
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).eval()
    folder = saved(model, tmp_path / "source")
    options = {**OPTIONS, "method": "gptq", "token_noise": 0.5}
    info = fxquant.quantize_checkpoint(folder, tmp_path / "new", options, batches())
    qmodel, expected = fxquant.quantize(model, batches(), options, target="compressed-tensors")
    assert info.calibration_samples_used == expected.calibration_samples_used == 8
    assert info.sqnr_db == pytest.approx(expected.sqnr_db, abs=0.2)
    found = weights(tmp_path / "new", info.selected_layers)
    layers = {site.name: site.module for site in sites(qmodel)}
    same = [(found[name] == layers[name].dequantize()).float().mean() for name in found]
    assert min(same) > 0.99
    plain, _ = fxquant.quantize(model, batches(), OPTIONS, target="compressed-tensors")
    name = "model.layers.0.mlp.down_proj"
    assert not torch.equal(plain.get_submodule(name).dequantize(), layers[name].dequantize())


def test_what_is_reported_is_what_the_folder_has(encoder, whole):
    folder, info = whole
    assert len(info.selected_layers) == 19
    outside = next(d for d in info.decisions if d.module == "cls.predictions.transform.dense")
    assert outside.reason.endswith("outside of the blocks: rounded without data")
    copy = filled(encoder, folder, info.selected_layers)
    last = {name: value[-1:] for name, value in batches()[1].items()}
    assert info.sqnr_db == pytest.approx(output_sqnr(encoder, copy, [last]), abs=0.01)
    biases = FolderReader(folder)
    name = "bert.encoder.layer.1.output.dense.bias"
    assert not torch.equal(biases.tensor(name), encoder.state_dict()[name])


def test_the_bits_do_not_depend_on_memory(source, whole, tmp_path):
    info = fxquant.quantize_checkpoint(source, tmp_path / "new", OPTIONS, batches(), memory="1KB")
    assert digest(tmp_path / "new") == digest(whole[0])
    assert info.to_dict() == whole[1].to_dict()
    with pytest.raises(OptionError, match="memory: got 'much'"):
        fxquant.quantize_checkpoint(source, tmp_path / "again", OPTIONS, batches(), memory="much")


SCRIPT = """
import sys, fxquant
from tests.exporters.test_blockwise import OPTIONS, batches
print("begin", flush=True)
fxquant.quantize_checkpoint(sys.argv[1], sys.argv[2], OPTIONS, batches())
"""


def test_a_killed_process_is_gone_on_with(source, whole, tmp_path):
    target, draw = tmp_path / "new", random.Random(0)
    command = [sys.executable, "-c", SCRIPT, str(source), str(target)]
    work, kept = tmp_path / "new.unfinished", 0
    for wanted in (2, 3):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        process.stdout.readline()
        while process.poll() is None and len(list(work.glob("model-*"))) < wanted:
            time.sleep(0.001)
        time.sleep(draw.random() / 10)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert not target.exists()
        assert len(list(work.glob("model-*"))) >= wanted > kept
        kept = wanted
    info = fxquant.quantize_checkpoint(source, target, OPTIONS, batches())
    assert digest(target) == digest(whole[0])
    assert info.to_dict() == whole[1].to_dict()


def test_finished_blocks_are_not_made_again_and_other_data_is_another_run(
    source, whole, tmp_path, monkeypatch
):
    write, made = UnfinishedFolder.write, []

    def failing(self, number, *args):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(number)
        return write(self, number, *args)

    monkeypatch.setattr(UnfinishedFolder, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        fxquant.quantize_checkpoint(source, tmp_path / "new", OPTIONS, batches())
    with pytest.raises(SaveError, match="interrupted run of another"):
        fxquant.quantize_checkpoint(source, tmp_path / "new", OPTIONS, batches()[:1])
    monkeypatch.setattr(
        UnfinishedFolder, "write", lambda *args: made.append(args[1]) or write(*args)
    )
    fxquant.quantize_checkpoint(source, tmp_path / "new", OPTIONS, batches())
    assert len(made) == len(set(made)) == 4  # three blocks, and what is outside of them
    assert digest(tmp_path / "new") == digest(whole[0])


def changed(source, folder, change):
    """A copy of the folder whose tensors went through `change`."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    reader = FolderReader(source)
    tensors = {name: reader.tensor(name).clone() for name in reader.files}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_bad_data_and_folders_are_refused_in_words(source, tmp_path):
    def run(folder, data, **options):
        fxquant.quantize_checkpoint(folder, tmp_path / "new", {**OPTIONS, **options}, data)

    with pytest.raises(OptionError, match="'gptq' without calibration data"):
        run(source, None, method="gptq")
    with pytest.raises(OptionError, match="'awq' for a model that is never whole in memory"):
        run(source, batches(), method="awq")
    with pytest.raises(CalibrationError, match="calibration batch 0: the model raises ValueError"):
        run(source, [{"words": tokens(2, 8, 0)}])
    with pytest.raises(CalibrationError, match="calibration batch 0: the model raises IndexError"):
        run(source, [{"input_ids": tokens(2, 8, 0) + 64}])
    with pytest.raises(CalibrationError, match="no samples"):
        run(source, [])
    name = "bert.encoder.layer.1.output.LayerNorm.weight"
    missing = changed(source, tmp_path / "missing", lambda tensors: tensors.pop(name))
    with pytest.raises(OptionError, match=rf"{name} in the folder .* got no such tensor"):
        run(missing, batches())
    assert not list(tmp_path.glob("new*"))
    name = "bert.encoder.layer.1.output.dense"

    def break_weight(tensors):
        tensors[f"{name}.weight"][3, 5] = float("nan")

    broken = changed(source, tmp_path / "broken", break_weight)
    with pytest.raises(WeightError, match=rf"{name}.weight: got NaN or Inf in 1 of"):
        fxquant.quantize_checkpoint(broken, tmp_path / "other", OPTIONS, batches())
    assert not (tmp_path / "other").exists()
    shard = next(source.glob("model-00002*"))
    kept = shard.rename(tmp_path / "kept")
    try:
        with pytest.raises(OptionError, match="it cannot be read"):
            run(source, batches())
    finally:
        kept.rename(shard)


def test_a_model_whose_blocks_are_not_one_list_is_refused(tmp_path):
    config = T5Config(d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2, vocab_size=64)
    folder = saved(T5ForConditionalGeneration(config), tmp_path / "source")
    call = {"input_ids": tokens(2, 8, 0), "decoder_input_ids": tokens(2, 8, 1)}
    with pytest.raises(
        OptionError, match=r"several lists of blocks: encoder\.block, decoder\.block"
    ):
        fxquant.quantize_checkpoint(folder, tmp_path / "new", OPTIONS, [call])
    assert not list(tmp_path.glob("new*"))


def test_the_command_line_takes_data_for_a_folder(source, tmp_path):
    save_file({"input_ids": tokens(8, 24, 0)}, tmp_path / "data.safetensors")
    command = ["quantize", str(source), "--output", str(tmp_path / "new"), "--method", "rtn",
               "--data", str(tmp_path / "data.safetensors"), "--group-size", "32"]  # fmt: skip
    done = CliRunner().invoke(cli, [*command, "--memory", "1KB"])
    assert done.exit_code == 0, done.output
    assert "19 quantized" in done.output
    assert "dB, measured on 1 rows held out" in done.output
    assert FolderReader(tmp_path / "new").config["quantization_config"]["quant_method"]
    done = CliRunner().invoke(cli, [*command, "--min-sqnr", "3"])
    assert done.exit_code == 2
    assert "Pass an --output that ends in .safetensors" in done.output


def test_each_block_is_a_file(whole):
    folder, _ = whole
    reader = FolderReader(folder)
    owners = {name.split(".")[3] for name in reader.files if ".layer." in name}
    assert owners == {"0", "1", "2"}
    for number in owners:
        files = {f for name, f in reader.files.items() if f".layer.{number}." in name}
        assert len(files) == 1
