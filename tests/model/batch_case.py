"""Sequences that share a step against each of them alone. A program of its own: it must start with TRITON_INTERPRET=1.

    python -m model.batch_case FOLDER FAMILY MODE ...     prints a JSON object for each pair: step -> relative error of its logits

MODE is `kernels` (ours, in the interpreter, f16) or `operators` (PyTorch's, fp32), with V alone `kernels-v` or `operators-v`.
Pages are scattered on purpose.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from torch import Tensor

import headwise.kernels.heads as heads_kernel
from headwise import LLM
from headwise.attention.capability import CPU, DeviceKind
from headwise.attention.choose import choose_layers
from headwise.cache.pages import extents
from headwise.cache.storage import Place
from headwise.engine.batch import Run
from headwise.engine.request import Sampling
from headwise.engine.runner import Runner
from headwise.engine.sample import Draw, tokens
from headwise.engine.stage import build_stages
from headwise.planner.memory import Target, Workload, plan
from headwise.planner.residence import groups
from headwise.spec.kv import kv_format, laid_out
from headwise.spec.layers import Kind
from headwise.spec.read import open_model
from headwise.weights.blocks import Weight
from headwise.weights.listing import list_checkpoint
from headwise.weights.load import load_weights
from headwise.weights.names import stored_types

LENGTHS = (68, 66, 5)  # of the prompts
PAGES = ([5, 2], [0, 7], [3])
CHUNK = 48


def save(family: str, folder: Path, *, global_head_dim: int = 128) -> Path:
    """A tiny model of a family with heads that our kernels take."""
    changes: dict[str, Any] = {"head_dim": 64}
    if family.startswith("gemma4"):
        changes["global_head_dim"] = global_head_dim
        few = [tiny.SLIDING, tiny.FULL] * (2 if family == "gemma4-e2b" else 1)  # the interpreter is slow
        changes |= {"layer_types": few, "num_hidden_layers": len(few)}
    if family == "gemma4-e2b":
        changes["num_kv_shared_layers"] = 2
    if family == "qwen3-moe":
        changes |= {"num_hidden_layers": 2, "moe_intermediate_size": 136}  # more than a block of scales in e4m3
    torch.manual_seed(0)
    config = tiny.model_config(family, **changes)
    tiny.lively(family, transformers.AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    return folder


def runner_of(path: Path, mode: str, *, context: int = 128, chunk: int = CHUNK, slots: int = 3, stages: int = 1) -> Runner:
    source = open_model(path, env={})
    mode, _, layout = mode.partition("-")
    spec = laid_out(source.spec, layout or None)
    dtype, kind = ("f16", DeviceKind("cuda", (8, 0), "a card")) if mode == "kernels" else ("f32", CPU)
    kv: dict[Kind, Any] = {"global": kv_format(dtype), "sliding": kv_format(dtype)}
    choices = choose_layers(spec, kv=kv, dtype=dtype, device=kind)
    reads = frozenset(c.backend.reads for c in choices)
    w = Workload(context=context, slots=slots, chunk=chunk, pool=512, kv=kv, dtype=dtype, cpu=kind is CPU, reads=reads)
    targets = [Target(name=f"card {i}", gpu=None, total_bytes=2**30) for i in range(stages)]
    p = plan(spec, stored_types(spec, list_checkpoint(path)), w, targets)

    def load(stage: int, device: torch.device) -> Mapping[str, Weight]:
        layers = p.stages[stage].layers
        return load_weights(spec, path, resident=p.resident, device=device, groups=groups(spec, p.resident), layers=layers)

    return Runner(p, build_stages(p, choices, [torch.device("cpu")] * stages, load))


def main(folder: Path, family: str, mode: str) -> dict[str, float]:
    path = save(family, folder)
    runner = runner_of(path, mode)
    alone = LLM(path, context=128, chunk=CHUNK, device="cpu", check=False)
    draw = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 300, (n + 14,), generator=draw).tolist() for n in LENGTHS]
    want = [alone.logits(ids) for ids in texts]
    places = [Place(i, extents(pages)) for i, pages in enumerate(PAGES)]
    done = [0, 0, 0]

    def step(*told: tuple[int, int, int]) -> float:
        """(sequence, tokens, wanted): the relative error of the wanted logits."""
        runs = [Run(places[s], done[s], texts[s][done[s] : done[s] + n], wanted) for s, n, wanted in told]
        x = runner.run(runs)
        got = [runner.logits(x[i : i + 1])[0].float().clone() for i in range(x.shape[0])]
        expected = list[Tensor]()
        for s, n, wanted in told:
            done[s] += n
            expected += want[s][done[s] - wanted : done[s]]
        if not expected:
            return 0.0
        return float((torch.stack(got) - torch.stack(expected)).norm() / torch.stack(expected).norm())

    out: dict[str, float] = {"dtype": 0.0 if mode.startswith("operators") else 1.0}
    out["a prompt begins"] = step((0, 48, 0))
    out["two prompts"] = step((0, 14, 0), (1, 32, 0))
    out["a prompt ends beside another"] = step((1, 33, 0), (0, 6, 1))
    out["an answer and the ends of two prompts"] = step((0, 1, 1), (1, 1, 1), (2, 5, 1))
    out["three answers"] = step((0, 1, 1), (1, 1, 1), (2, 1, 1))
    out["drafts"] = step((0, 8, 8))
    out["answers with drafts"] = step((1, 4, 4), (2, 4, 4), (0, 2, 2))
    done[1] -= 2  # two drafts are refused, and others come in their place
    out["after refused drafts"] = step((2, 1, 1), (1, 4, 4))
    x = runner.run([Run(places[s], done[s], texts[s][done[s] : done[s] + 1], 1) for s in range(3)])
    draws = [Draw(Sampling()), Draw(Sampling(temperature=1.0), 0.6), Draw(Sampling(temperature=1.0, top_k=40, top_p=0.9), 0.3)]
    logits = runner.logits(x).clone()
    got, drawn = runner.draw(x, draws)
    out["drawn"] = float((got - logits).norm() / logits.norm()) + float((drawn != tokens(logits, draws)).sum())
    return out


if __name__ == "__main__":
    heads_kernel.FEW = 0  # of 64: the interpreter pays for each program
    for family, mode in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
        print(json.dumps(main(Path(sys.argv[1]) / f"{family} {mode}", family, mode)), flush=True)
