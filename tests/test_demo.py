import json

import torch
import torch.nn.functional as F
from click.testing import CliRunner

import fxquant
from fxquant.cli.main import cli
from fxquant.demo.language_model import heldout_tokens, load_language_model
from fxquant.demo.measure import perplexity
from fxquant.demo.run import EVALUATION_STRIDE


def test_the_demos_figures_can_be_recomputed(tmp_path):
    path = tmp_path / "model.safetensors"
    result = CliRunner().invoke(cli, ["demo", "--json", "--output", str(path)])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    tokens = heldout_tokens()[::EVALUATION_STRIDE]
    model, loaded = load_language_model(), fxquant.load_model(path)
    for name, run in (("float", model), ("int4", loaded)):
        with torch.no_grad():
            logits = torch.cat([run(part) for part in tokens.split(32)])
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert abs(figures[f"perplexity_{name}"] - loss.exp().item()) < 1e-3
    assert figures["perplexity_float"] < 3
    assert figures["perplexity_int4"] < figures["perplexity_float"] * 1.02
    assert figures["reload_is_identical"]
    assert figures["file_bytes"] == path.stat().st_size
    original = sum(p.numel() * 4 for p in model.parameters()) + 32 * 4
    assert figures["bytes_float"] == original
    assert figures["info"]["sqnr_db"] > 25


def test_the_embedded_model_generates_the_same_with_and_without_its_cache():
    model = load_language_model()
    tokens = torch.tensor([list(b"And the king said ")])
    generated = model.generate(tokens, 8)
    for _ in range(8):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generated, tokens)


def test_the_embedded_model_is_small_and_trained():
    model = load_language_model()
    assert perplexity(model, heldout_tokens()[::16]) < 3
