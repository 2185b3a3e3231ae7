"""Train the embedded byte-level language model again from plain text files.

    python examples/train_language_model.py kjv.txt devil.txt jargon.txt --minutes 45

The shipped weights were trained on three public-domain texts (see fxquant/demo/README.md): Debian
packages them as `bible-kjv-text`, `dict-devil` and `jargon-text`. Every 32nd piece of 8 KiB is held
out; `heldout.txt` and `calibration.txt` (the latter from the training part) are written beside the
weights. Training is seeded; on another machine the weights differ in the last digits.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fxquant.demo.language_model import CONTEXT, ByteLanguageModel

PIECE = 8192
HELD_OUT_EVERY = 32
BATCH = 32
WARM_UP = 0.02  # shares of the time
PEAK_RATE = 2e-3
EXCERPT = 98304  # bytes of held-out and of calibration text that are shipped


def split(texts: list[bytes]) -> tuple[bytes, bytes]:
    """Training and held-out text: every 32nd piece of each file is held out."""
    kept, held = bytearray(), bytearray()
    for text in texts:
        for number, start in enumerate(range(0, len(text), PIECE)):
            part = held if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else kept
            part += text[start : start + PIECE]
    return bytes(kept), bytes(held)


def excerpt(text: bytes) -> bytes:
    """Evenly spaced windows of `text`, about EXCERPT bytes."""
    count = EXCERPT // CONTEXT
    stride = max(CONTEXT, len(text) // count)
    starts = range(0, len(text) - CONTEXT, stride)
    return b"".join(text[start : start + CONTEXT] for start in starts)[:EXCERPT]


def learning_rate(done: float) -> float:
    """Linear warm-up, then a cosine to a twentieth; `done` is the share of the time used."""
    if done < WARM_UP:
        return PEAK_RATE * done / WARM_UP + 1e-5
    cosine = (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2
    return PEAK_RATE * (0.05 + 0.95 * cosine)


def bits_per_byte(model: ByteLanguageModel, tokens: torch.Tensor) -> float:
    """Mean cross-entropy of the next byte, in bits, over `tokens` [samples, CONTEXT]."""
    with torch.inference_mode():
        logits = torch.cat([model(batch) for batch in tokens.split(32)])
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return loss.item() / math.log(2)


def main() -> None:
    """Train for a given time and write the weights and the two excerpts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--out", type=Path, default=Path("fxquant/demo"))
    arguments = parser.parse_args()

    kept, held = split([path.read_bytes() for path in arguments.texts])
    (arguments.out / "calibration.txt").write_bytes(excerpt(kept))
    (arguments.out / "heldout.txt").write_bytes(excerpt(held))
    data = torch.frombuffer(bytearray(kept), dtype=torch.uint8)
    heldout = torch.frombuffer(bytearray(excerpt(held)), dtype=torch.uint8).long().view(-1, CONTEXT)

    torch.manual_seed(0)
    model = ByteLanguageModel()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            depth = 0.02 / math.sqrt(2 * len(model.blocks))
            std = depth if "o_proj" in name or "down_proj" in name else 0.02
            torch.nn.init.normal_(parameter, std=std)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=PEAK_RATE,
        betas=(0.9, 0.95),
    )
    window = torch.arange(CONTEXT + 1)
    began, step = time.monotonic(), 0
    while (done := (time.monotonic() - began) / (60 * arguments.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done)
        starts = torch.randint(len(data) - CONTEXT - 1, (BATCH, 1))
        batch = data[starts + window].long()  # [BATCH, CONTEXT + 1]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            seconds = time.monotonic() - began
            print(f"step {step}  {seconds:.0f} s  {loss.item() / math.log(2):.3f} bits", flush=True)

    model.eval()
    print(f"held out: {bits_per_byte(model, heldout):.4f} bits per byte after {step} steps")
    state = {n: p.detach().half() for n, p in model.state_dict().items() if n != "lm_head.weight"}
    save_file(state, arguments.out / "language_model.safetensors", metadata={"steps": str(step)})


if __name__ == "__main__":
    main()
