"""llama.cpp in this process, and a GGUF of a catalogue model with random weights for it to read.

The library is called through its C interface, whose structures are those of release 0.5.0; another release is refused.
The file holds the numbers that `headwise.bench.engine` makes on the same device for the same plan, so that both can be
compared on it. Only dense models of the gemma4 family are written.

Needs the gguf package, and shared libraries: of the release's sources (the sdist of llama-cpp-python 0.3.36 has them) built by
CMake with BUILD_SHARED_LIBS, for a card with GGML_CUDA and its CMAKE_CUDA_ARCHITECTURES. Packages of binaries fit few cards.

Source    llama.cpp 0.5.0 include/llama.h; keys and tensors of the file: tests/gguf_files.py, headwise/weights/names.py.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import torch
from torch import Tensor

from headwise.bench.engine import blocks_of, first_layers, in_bf16, random_weights, runner_for
from headwise.errors import UsageError
from headwise.planner.memory import Plan
from headwise.spec import catalogue
from headwise.spec.layers import ModelSpec
from headwise.spec.tensors import weight_tensors
from headwise.weights.blocks import Weight
from headwise.weights.names import gguf_name


class ModelParams(Structure):
    _fields_ = [
        ("devices", c_void_p), ("tensor_buft_overrides", c_void_p), ("n_gpu_layers", c_int32), ("split_mode", c_int),
        ("load_mode", c_int), ("lazy_mode", c_int), ("main_gpu", c_int32), ("tensor_split", c_void_p),
        ("progress_callback", c_void_p), ("progress_data", c_void_p), ("kv_overrides", c_void_p), ("vocab_only", c_bool),
        ("check_tensors", c_bool), ("use_extra_bufts", c_bool), ("no_host", c_bool), ("no_alloc", c_bool), ("load_mtp", c_bool),
    ]  # fmt: skip


class ContextParams(Structure):
    _fields_ = [
        ("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("n_seq_max", c_uint32), ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32), ("n_outputs_max_per_seq", c_uint32), ("n_threads", c_int32), ("n_threads_batch", c_int32),
        ("ctx_type", c_int), ("rope_scaling_type", c_int), ("pooling_type", c_int), ("attention_type", c_int),
        ("flash_attn_type", c_int), ("rope_freq_base", c_float), ("rope_freq_scale", c_float), ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float), ("yarn_beta_fast", c_float), ("yarn_beta_slow", c_float), ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float), ("cb_eval", c_void_p), ("cb_eval_data", c_void_p), ("type_k", c_int), ("type_v", c_int),
        ("abort_callback", c_void_p), ("abort_data", c_void_p), ("embeddings", c_bool), ("offload_kqv", c_bool),
        ("no_perf", c_bool), ("op_offload", c_bool), ("swa_full", c_bool), ("kv_unified", c_bool),
        ("samplers", c_void_p), ("n_samplers", c_size_t), ("ctx_other", c_void_p),
    ]  # fmt: skip


class Batch(Structure):
    _fields_ = [
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", c_void_p), ("pos", c_void_p), ("n_seq_id", c_void_p),
        ("seq_id", c_void_p), ("logits", POINTER(c_int8)),
    ]  # fmt: skip


DEFAULTS = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "flash_attn_type": -1, "type_k": 1, "type_v": 1, "offload_kqv": True}


AGREES = 0.1  # relative, of logits: llama.cpp rounds activations to 8 bits


class Wrong(RuntimeError):
    """Its answer is not headwise's."""


def _log(level: int, text: bytes, _: Any) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        print("llama.cpp:", text.decode(errors="replace").rstrip(), flush=True)


class LlamaCpp:
    """One model and one context of it, every layer on the GPU where there is one; flash attention on, f16 cache.

    Args:
        folder: holds libllama*.so, libggml*.so and the backends. CUDA's own libraries come from PyTorch, loaded before.
    Raises:
        UsageError: the folder lacks the library, it is another release, or it has refused the model or the context.
    """

    library: Any = None
    keep: Any = None  # the log's callback, which C holds

    def __init__(self, folder: Path, model: Path, *, context: int, ubatch: int, threads: int = 8) -> None:
        self.lib = lib = LlamaCpp.library = LlamaCpp.library or _library(folder)
        asked = lib.llama_model_default_params()
        asked.n_gpu_layers = 999
        self.model = lib.llama_model_load_from_file(str(model).encode(), asked)
        if not self.model:
            raise UsageError(f"llama.cpp does not load {model}", why="its log says why", do="see above")
        c = lib.llama_context_default_params()
        c.n_ctx, c.n_batch, c.n_ubatch, c.flash_attn_type, c.swa_full = context, ubatch, ubatch, 1, False
        c.n_threads = c.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, c)
        if not self.context:
            lib.llama_model_free(self.model)
            raise UsageError(f"llama.cpp makes no context of {context} tokens", why="its log says why", do="a shorter one")
        self.ubatch = ubatch
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def prefill(self, ids: Sequence[int]) -> Tensor:
        """The last token's logits of a prompt, (vocab,), f32 on the host; logits of no other token are computed but each batch's
        last."""
        lib = self.lib
        lib.llama_memory_clear(lib.llama_get_memory(self.context), False)
        for start in range(0, len(ids), self.ubatch):
            self._step(ids[start : start + self.ubatch])
        return torch.from_numpy(self._logits().copy())

    def decode(self, n: int) -> float:
        """Seconds of a token, the median of `n` greedy ones behind the prompt."""
        took = []
        token = int(self._logits().argmax())
        for _ in range(n):
            start = time.perf_counter()
            self._step([token])
            token = int(self._logits().argmax())
            took.append(time.perf_counter() - start)
        return statistics.median(took)

    def _step(self, ids: Sequence[int]) -> None:
        status = self.lib.llama_decode(self.context, Batch(len(ids), (c_int32 * len(ids))(*ids)))
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {len(ids):,} tokens")

    def _logits(self) -> np.ndarray:
        self.lib.llama_synchronize(self.context)
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, -1), (self.vocabulary,))

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


def _library(folder: Path) -> Any:
    found = []
    for stem in ("libggml-base", "libggml", "libllama"):
        files = [*folder.glob(f"{stem}.so"), *folder.glob(f"{stem}.*.so")]  # with the release in its name, or without
        if not files:
            raise UsageError(f"{folder} holds no llama.cpp", why=f"{stem}.so is missing", do="--llama-cpp DIR of a build")
        found.append(ctypes.CDLL(str(files[0]), mode=ctypes.RTLD_GLOBAL))
    _, ggml, lib = found
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "llama_model_default_params": (ModelParams, []),
        "llama_context_default_params": (ContextParams, []),
        "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
        "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
        "llama_get_memory": (c_void_p, [c_void_p]),
        "llama_memory_clear": (None, [c_void_p, c_bool]),
        "llama_decode": (c_int32, [c_void_p, Batch]),
        "llama_synchronize": (None, [c_void_p]),
        "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
        "llama_model_get_vocab": (c_void_p, [c_void_p]),
        "llama_vocab_n_tokens": (c_int32, [c_void_p]),
        "llama_free": (None, [c_void_p]),
        "llama_model_free": (None, [c_void_p]),
        "llama_log_set": (None, [c_void_p, c_void_p]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    defaults = lib.llama_context_default_params()
    wrong = {k: getattr(defaults, k) for k, v in DEFAULTS.items() if getattr(defaults, k) != v}
    if wrong:
        raise UsageError(f"{folder} is another release of llama.cpp", why=f"its defaults read as {wrong}", do="release 0.5.0")
    LlamaCpp.keep = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(_log)
    lib.llama_log_set(LlamaCpp.keep, None)
    ggml.ggml_backend_load_all_from_path.argtypes = [c_char_p]
    ggml.ggml_backend_load_all_from_path(str(folder).encode())
    lib.llama_backend_init()
    return lib


def opened(folder: Path, spec: ModelSpec, p: Plan, device: torch.device, *, context: int, ubatch: int) -> tuple[LlamaCpp, float]:
    """A plan's model with its random weights, once the logits of its first layers agreed with headwise's; and their relative error.

    Files are made in memory where the system has a folder for that.

    Raises:
        Wrong: they did not agree.
    """
    small, shm = first_layers(spec), Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None) as scratch:
        file = Path(scratch) / "random.gguf"
        runner, _, first = runner_for(small, context=2048, chunk=512, device=device, **in_bf16(small, "q4_k_m", device))
        write(file, small, first, device)
        ids = torch.randint(3, spec.vocab_size, (1300,)).tolist()
        want = runner.logits(runner.prefill(ids))[0].double().cpu()
        del runner
        gc.collect()
        torch.cuda.empty_cache()
        engine = LlamaCpp(folder, file, context=2048, ubatch=512)
        got = engine.prefill(ids).double()
        engine.close()
        error = float((got - want).norm() / want.norm())
        print(f"llama.cpp's logits after {len(small.layers)} layers: {error:.1e} from headwise's", flush=True)
        if not error < AGREES:
            raise Wrong(f"its logits are {error:.1e} from headwise's, over {AGREES}")
        seconds = write(file, spec, p, device)
        print(f"{file.stat().st_size / 1e9:.1f} GB written in {seconds:.0f} s", flush=True)
        torch.cuda.empty_cache()
        return LlamaCpp(folder, file, context=context, ubatch=ubatch), error


def config_of(name: str, n_layers: int) -> dict[str, Any]:
    """The catalogue's config of a model, its first layers, with what llama.cpp's converter takes from elsewhere."""
    config = catalogue.config(name)
    config["layer_types"] = config["layer_types"][:n_layers]
    return config | {"num_hidden_layers": n_layers, "hidden_size_per_layer_input": 0, "bos_token_id": 1, "eos_token_id": 2}


def write(path: Path, spec: ModelSpec, p: Plan, device: torch.device, weights: Mapping[str, Weight] | None = None) -> float:
    """`spec` as a GGUF with the random weights of a plan, default made anew; seconds that took.

    Raises:
        UsageError: the model is of another family, or has experts or inputs of each layer.
    """
    if spec.family != "gemma4" or spec.ple or any(x.mlp.moe for x in spec.layers):
        raise UsageError(f"{spec.name} is not written as a GGUF here", why="gemma4, dense, without PLE only", do="gemma-4-12b")
    began = time.perf_counter()
    weights = random_weights(spec, p, device)[0] if weights is None else weights
    w = gguf.GGUFWriter(path, "gemma4")
    geometry = gguf_files.add_metadata(w, "gemma4", config_of(spec.name, len(spec.layers)))
    gguf_files.add_tokenizer(w, spec.vocab_size)
    factors = np.array(geometry.factors, np.float32)
    w.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    tensors = weight_tensors(spec)
    for t in tensors:
        if isinstance(weights[t.name], Tensor):
            w.add_tensor_info(gguf_name(t.name), t.shape, np.dtype(np.float32), 4 * t.n_elements)
        else:
            kind = gguf.GGMLQuantizationType[p.resident[t.name].upper()]
            shape = gguf.quant_shape_to_byte_shape(t.shape, kind)
            w.add_tensor_info(gguf_name(t.name), shape, np.dtype(np.uint8), int(np.prod(shape)), kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    w.write_tensor_data(factors)
    for t in tensors:
        held = weights[t.name]
        if isinstance(held, Tensor):
            w.write_tensor_data(held.float().cpu().numpy())
        else:
            parts = [blocks.cpu().numpy() for *_, blocks in blocks_of(t, p.resident[t.name], device)]
            w.write_tensor_data(np.concatenate(parts))
    w.close()
    return time.perf_counter() - began
