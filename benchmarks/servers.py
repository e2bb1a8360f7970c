"""What vLLM's and SGLang's own code makes of an exported folder, on a CPU and without their kernels.

    python benchmarks/servers.py granite --vllm vllm-0.33.0        # in an environment with vLLM's requirements
    python benchmarks/servers.py granite --sglang sglang-0.5.23    # in any with transformers

FOLDER is what 'distill export --to hf-native' wrote, the rest are unpacked sources (``pip download --no-deps``: of vLLM
the source distribution, never the wheel, which brings gigabytes; of SGLang the wheel). vLLM: the engine's config on its
CPU platform, its model built, and its loader given the folder's tensors. SGLang: its config class; the modules that it
takes from a running server are replaced. Nothing is computed: that takes their kernels. Prints a line a fact.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}


def vllm(folder: str, sources: Path) -> None:
    """vLLM's engine config, model and loader."""
    sys.path.insert(0, str(sources))
    os.environ["PYTHONPATH"] = str(sources)  # it looks at models in processes of their own
    import torch
    from safetensors.torch import load_file
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models.granitemoehybrid import GraniteMoeHybridForCausalLM

    options: dict[str, Any] = {"skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True}
    config = EngineArgs(model=folder, tokenizer=folder, max_model_len=256, **options).create_engine_config()
    model, parallel = config.model_config, config.parallel_config
    print(f"architectures {model.architectures}, hybrid {model.is_hybrid}, head size {model.get_head_size()}, "
          f"key/value heads {model.get_num_kv_heads(parallel)}")  # fmt: skip
    print("states", GraniteMoeHybridForCausalLM.get_mamba_state_shape_from_config(config))
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:29611", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        built = GraniteMoeHybridForCausalLM(vllm_config=config)
        given = load_file(Path(folder) / "model.safetensors")
        loaded = built.load_weights(iter(given.items()))
    names = {name for name, _ in built.named_parameters()}
    print(f"{len(given)} tensors fill {len(loaded)} of {len(names)} parameters; missing: {sorted(names - loaded)}")
    for block, layer in enumerate(built.model.layers):
        if hasattr(layer, "mamba"):
            right = torch.allclose(layer.mamba.A, -given[f"model.layers.{block}.mamba.A_log"].exp())
            norm = layer.mamba.norm
            print(
                f"block {block}: A = -exp(A_log) {right}, norm of {norm.n_groups} groups, eps {norm.variance_epsilon}"
            )
        else:
            rope, scale = layer.self_attn.rotary_emb, layer.self_attn.attention_multiplier
            print(f"block {block}: {type(rope).__name__} of {rope.rotary_dim}, scale {scale}")


def sglang(folder: str, sources: Path) -> None:
    """SGLang's config class, and the cache that follows from it."""

    def stand_in(name: str, **attributes: Any) -> None:
        module = types.ModuleType(name)
        vars(module).update(attributes, __path__=[str(sources / name.replace(".", "/"))])
        sys.modules[name] = module

    def divide(a: int, b: int) -> int:
        assert a % b == 0, (a, b)
        return a // b

    unset = types.SimpleNamespace(get=lambda: None)
    parallel = types.SimpleNamespace(attn_tp_size=1, tp_size=1)
    for name in ("sglang", "sglang.srt", "sglang.srt.configs", "sglang.srt.distributed"):
        stand_in(name)
    stand_in("sglang.srt.runtime_context", get_parallel=lambda: parallel)
    stand_in("sglang.srt.distributed.utils", divide=divide)
    environment = types.SimpleNamespace(SGLANG_MAMBA_CONV_DTYPE=unset, SGLANG_MAMBA_SSM_DTYPE=unset)
    stand_in("sglang.srt.environ", envs=environment)
    config = importlib.import_module("sglang.srt.configs.granitemoehybrid").GraniteMoeHybridConfig.from_pretrained(
        folder
    )
    print(f"layers {config.layer_types}, head size {config.hidden_size // config.num_attention_heads}")
    print(f"{config.position_embedding_type}, theta {config.rope_theta}, scaling {config.rope_scaling}")
    shape = config.mamba2_cache_params.shape
    print(f"states {shape.conv} and {shape.temporal}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--vllm", metavar="DIR", type=Path)
    parser.add_argument("--sglang", metavar="DIR", type=Path)
    args = parser.parse_args()
    import transformers

    print("transformers", transformers.__version__)
    if args.vllm:
        vllm(args.folder, args.vllm)
    if args.sglang:
        sglang(args.folder, args.sglang)


if __name__ == "__main__":
    main()
