"""Do llama.cpp's converter, llama.cpp, transformers and headwise agree on one tiny model of every family?

    PYTHONPATH=.:tests:BINDINGS python benchmarks/llamacpp_converter.py --llamacpp SOURCE [OUT.json]

Each tiny random checkpoint (tests/tiny.py) is converted to f32 by llama.cpp's own convert_hf_to_gguf.py, without a vocabulary
(the checkpoints have none; nothing else is patched). headwise and llama.cpp open that file, and llama.cpp opens headwise's
own GGUF twin of the same weights (tests/gguf_files.py); the logits of every position are compared with transformers'.

llama.cpp comes from the source package of llama-cpp-python, built with cmake and GGML_AVX2 or better; BINDINGS is that
package's folder and LLAMA_CPP_LIB_PATH the folder of libllama.so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import about
import gguf_files
import tiny
import torch
import transformers

from headwise import LLM

CONVERT = """
import sys; sys.path[:0] = [{source!r}, {source!r} + "/gguf-py"]
import convert_hf_to_gguf as main
from conversion import base
def no_vocabulary(self):
    self._set_vocab_none()
    self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])
find = main.get_model_class
def patched(*args, **options):
    found = find(*args, **options)
    found.set_vocab = no_vocabulary
    return found
main.get_model_class = patched
sys.argv = ["convert", {model!r}, "--outtype", "f32", "--outfile", {out!r}]
main.main()
"""
N_TOKENS = 83  # several windows of 13


def variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """Shapes that llama.cpp takes where it fixes in its source what the config of tests/tiny.py says otherwise."""
    kind, moe = tiny.CONFIGS["qwen3-moe"]
    _, exaone = tiny.CONFIGS["exaone4"]
    _, oss = tiny.CONFIGS["gpt-oss"]
    return {
        "qwen3-moe, every layer": (kind, moe | {"mlp_only_layers": []}),
        "exaone4, 64 layers": ("exaone4", exaone | {"num_hidden_layers": 64, "layer_types": exaone["layer_types"] * 16}),
        "gpt-oss, yarn truncated": ("gpt_oss", oss | {"rope_parameters": oss["rope_parameters"] | {"truncate": True}}),
    }


NOTES = {
    "gemma4": "ggml's CPU GELU is a table in f16",
    "gemma3": "llama.cpp takes every sixth layer as global, this model every third; gemma3-5to1 is as released",
    "exaone4": "llama.cpp knows a window only for 64 layers",
    "qwen3-moe": "llama.cpp has no dense layers among the experts",
    "gpt-oss": "llama.cpp's yarn rounds its correction range; gpt-oss says truncate false, as here",
}


def convert(source: Path, model: Path, out: Path) -> str | None:
    """The converter's last words where it fails."""
    code = CONVERT.format(source=str(source), model=str(model), out=str(out))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def llamacpp_logits(path: Path, ids: list[int]) -> torch.Tensor:
    import llama_cpp

    llm = llama_cpp.Llama(
        str(path), n_ctx=128, n_batch=128, n_ubatch=128, n_threads=2, logits_all=True, flash_attn=False, verbose=False,
        type_k=0, type_v=0,
    )  # fmt: skip
    llm.eval(ids)
    return torch.tensor(llm.scores[: len(ids)].copy())


def written(name: str, path: Path) -> Path:
    gguf_files.write_gguf(name, path)
    return path


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max())


def one(name: str, source: Path, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    ids = torch.randint(3, 320, (N_TOKENS,)).tolist()
    want = tiny.logits(name, ids)
    note = NOTES.get("gemma4" if name.startswith("gemma4") else name)
    row: dict[str, Any] = {"model": name, "largest_logit": float(want.abs().max()), "note": note}
    tiny.save(name, folder / "hf")
    vocabulary = {"model": {"vocab": {f"t{i}": i for i in range(320)}}, "added_tokens": []}
    (folder / "hf" / "tokenizer.json").write_text(json.dumps(vocabulary))  # Gemma's converter counts it
    converted, twin = folder / "converted.gguf", folder / "twin.gguf"
    failure = convert(source, folder / "hf", converted)
    for label, make in (
        ("converted, headwise", lambda: LLM(converted, context=128, chunk=96, device="cpu", check=False).logits(ids)),
        ("converted, llama.cpp", lambda: llamacpp_logits(converted, ids)),
        ("twin, llama.cpp", lambda: llamacpp_logits(written(name, twin), ids)),
    ):
        if failure and label.startswith("converted"):
            row[label] = f"not converted: {failure}"
            continue
        try:
            row[label] = difference(make(), want)
        except Exception as error:  # a table of what failed is the point of this script
            row[label] = f"{type(error).__name__}: {error}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--llamacpp", type=Path, required=True, help="folder with convert_hf_to_gguf.py")
    parser.add_argument("--only", help="one model of tests/tiny.py")
    parser.add_argument("out", nargs="?")
    args = parser.parse_args()
    import llama_cpp

    rows = []
    tiny.CONFIGS.update(variants())
    for name in [args.only] if args.only else tiny.CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(one(name, args.llamacpp.resolve(), Path(folder)))
        print(rows[-1], flush=True)
    commit = about.commit()
    result = {
        "date": time.strftime("%Y-%m-%d"), "commit": commit, "torch": torch.__version__, "transformers": transformers.__version__,
        "llama_cpp_python": llama_cpp.__version__, "tokens": N_TOKENS, "models": rows,
    }  # fmt: skip
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
