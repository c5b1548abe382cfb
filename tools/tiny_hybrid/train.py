"""Trains tiny-hybrid on one GPU for a given time.

    python train.py --data DIR --minutes 22 --out RUN

Reads DIR/train.u16 and DIR/heldout/*.u16 (pack.py). Matrices are trained with Muon, the embedding and the norms with
AdamW, in bf16 with float32 parameters; the rate warms up, holds, and falls linearly to zero as the time runs out. The
last LONG_SHARE of the time is spent on sequences of LONG tokens so that long contexts are seen. Every sequence starts
with <bos>, also in the middle of a file, because that is how the model is used.

Writes RUN/log.jsonl (a line every LOG_EVERY steps), RUN/weights.pt (float32 state dict, every two minutes and at the end).
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import time
from collections.abc import Iterator

import numpy as np
import torch
from export import read_state
from model import Config, TinyHybrid
from tokenizer import BOS
from torch import Tensor

SHORT, LONG = 4096, 32768  # tokens a sequence
LONG_SHARE = 0.16  # of the time
BATCH_TOKENS = 131072
MUON_RATE, ADAM_RATE = 0.02, 2e-3
MUON_DECAY = 0.04
WARM_UP_STEPS = 100
FALL_FROM = 0.3  # share of the time after which the rate falls
LOG_EVERY, EVAL_EVERY = 20, 400


@torch.compile
def orthogonalise(g: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards the nearest orthogonal matrix, for a stack [n, rows, columns] in bf16."""
    x = g.bfloat16()
    if wide := g.shape[-2] > g.shape[-1]:
        x = x.mT
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7).bfloat16()
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if wide else x).float()


class Muon:
    """Momentum whose step is orthogonalised, matrices of one shape at a time. Source: Jordan et al. 2024, Muon."""

    def __init__(self, params: list[Tensor], momentum: float = 0.95) -> None:
        groups = collections.defaultdict(list)
        for p in params:
            groups[tuple(p.shape)].append(p)
        self.groups = [(ps, torch.zeros(len(ps), *shape, device=ps[0].device)) for shape, ps in groups.items()]
        self.momentum = momentum

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for params, buffer in self.groups:
            grad = torch.stack([p.grad for p in params])
            buffer.lerp_(grad, 1 - self.momentum)
            update = orthogonalise(grad.lerp(buffer, self.momentum))
            rows, columns = params[0].shape
            torch._foreach_mul_(params, 1 - rate * MUON_DECAY)
            torch._foreach_add_(params, list(update.unbind()), alpha=-rate * max(1.0, rows / columns) ** 0.5)
            for p in params:
                p.grad = None


def windows(tokens: Tensor, n_tokens: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of (inputs, targets) [B, n_tokens]: every epoch cuts the stream anew at a random phase."""
    per_batch = BATCH_TOKENS // n_tokens
    inner = torch.arange(n_tokens, device=tokens.device)
    while True:
        phase = int(torch.randint(n_tokens, (), generator=generator))
        n_windows = (len(tokens) - phase) // n_tokens
        starts = phase + n_tokens * torch.randperm(n_windows, generator=generator)
        for batch in starts[: n_windows // per_batch * per_batch].view(-1, per_batch).to(tokens.device):
            targets = tokens[batch[:, None] + inner].long()
            inputs = targets.roll(1, 1)
            inputs[:, 0] = BOS
            yield inputs, targets


def learning_rate(step: int, progress: float) -> float:
    """Share of the peak rate at `step` and `progress` (0 to 1 of the time)."""
    return min(1.0, (step + 1) / WARM_UP_STEPS, max(0.0, (1 - progress) / (1 - FALL_FROM)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="training time, after compilation")
    parser.add_argument("--init", type=pathlib.Path, help="a .gguf of export.py to go on from")
    parser.add_argument("--peak", type=float, default=1.0, help="share of the usual rates to rise to; less with --init")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda"
    tokens = torch.from_numpy(np.fromfile(args.data / "train.u16", np.uint16).astype(np.int16)).to(device)
    held_out = np.concatenate([np.fromfile(p, np.uint16) for p in sorted((args.data / "heldout").glob("*.u16"))])
    n_eval = BATCH_TOKENS // SHORT
    starts = np.linspace(0, len(held_out) - SHORT - 1, n_eval).astype(int)
    eval_targets = torch.from_numpy(np.stack([held_out[s : s + SHORT] for s in starts]).astype(np.int64)).to(device)
    eval_inputs = eval_targets.roll(1, 1)
    eval_inputs[:, 0] = BOS

    model = TinyHybrid(Config()).to(device)
    if args.init:
        model.load_state_dict(read_state(args.init))
    else:
        model.initialise(seed=4)
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    head = torch.compile(model.head_loss, dynamic=False)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        model.chunk = max(1024, inputs.shape[1] // 16)
        with torch.autocast("cuda", torch.bfloat16):
            return head(model.hidden(inputs), targets)

    generator = torch.Generator().manual_seed(5 if args.init else 4)
    batches = {n: windows(tokens, n, generator) for n in (SHORT, LONG)}
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for n in (LONG, SHORT):  # compile both lengths before the clock starts
        began = time.monotonic()
        loss_of(*next(batches[n])).backward()
        torch.cuda.synchronize()
        compiled = time.monotonic()
        for _ in range(3):
            loss_of(*next(batches[n])).backward()
        torch.cuda.synchronize()
        rate = 3 * BATCH_TOKENS / (time.monotonic() - compiled)
        print(f"length {n}: compiled in {compiled - began:.0f} s, {rate / 1e3:.0f} k tokens/s, "
              f"{torch.cuda.max_memory_allocated() / 2**30:.0f} GiB", flush=True)  # fmt: skip
        model.zero_grad()
    with torch.no_grad():
        loss_of(eval_inputs, eval_targets)
    for _, buffer in muon.groups:
        orthogonalise(buffer)

    def save(name: str) -> None:
        torch.save({n: p.detach().float().cpu() for n, p in model.named_parameters()}, args.out / f"{name}.tmp")
        (args.out / f"{name}.tmp").rename(args.out / name)

    log = (args.out / "log.jsonl").open("w", buffering=1)
    began, saved, step, n_tokens, losses = time.monotonic(), 0.0, 0, 0, []
    while (elapsed := time.monotonic() - began) < 60 * args.minutes:
        progress = elapsed / (60 * args.minutes)
        length = LONG if progress > 1 - LONG_SHARE else SHORT
        share = args.peak * learning_rate(step, progress)
        loss = loss_of(*next(batches[length]))
        loss.backward()
        muon.step(MUON_RATE * share)
        for group in adam.param_groups:
            group["lr"] = ADAM_RATE * share
        adam.step()
        adam.zero_grad()
        losses.append(loss.detach())
        step, n_tokens = step + 1, n_tokens + BATCH_TOKENS
        if step % LOG_EVERY == 0:
            row = {"step": step, "tokens": n_tokens, "length": length, "rate": round(share, 4),
                   "train_nats": round(torch.stack(losses).mean().item(), 4)}  # fmt: skip
            losses.clear()
            if step % EVAL_EVERY == 0:
                with torch.no_grad():
                    row["held_out_nats"] = round(loss_of(eval_inputs, eval_targets).item(), 4)
            row["seconds"] = round(time.monotonic() - began, 1)
            print(json.dumps(row), file=log)
        if elapsed - saved > 120:
            save("weights.pt")
            saved = elapsed
    save("weights.pt")
    log.close()
    print(f"{step} steps, {n_tokens / 1e6:.0f} M tokens of {len(tokens) / 1e6:.0f} M, {elapsed / 60:.1f} minutes")


if __name__ == "__main__":
    main()
