"""Builds a 4-bit model of random weights in the shape of a real one, a layer at a time, to measure memory and speed.

    python scripts/make_shape.py --config llama-3.1-8b --tokenizer TOKENIZER_FOLDER_OR_ID --output_dir DIR

The config is a folder, a Hub id or a name that `qlora-dpo plan --list` shows. Every linear layer but the head is in NF4
with double quantisation, embeddings, norms and head in bf16, as `load_policy` would have it; `from_pretrained` loads
the folder as it is. Disk and memory stay near half a byte a weight. The weights are drawn small enough that activations
stay finite; the text such a model writes is noise.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedConfig

from qlora_dpo.shapes import BUILT_IN, built_in_config

SHARD_BYTES = 2**32
STD = 0.02


def quantised(layer: nn.Linear, prefix: str, device: str) -> dict[str, Tensor]:
    """Tensors of a linear layer of random weights in NF4, as `save_pretrained` names them."""
    # On the meta device, as its own random weights would be drawn on the CPU and thrown away.
    new = Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4", device="meta")
    weights = torch.randn(layer.out_features, layer.in_features, device=device, dtype=torch.bfloat16) * STD
    new.weight = Params4bit(weights, requires_grad=False, quant_type="nf4", module=new).to(device)
    state = new.state_dict() | ({} if layer.bias is None else {"bias": torch.zeros(layer.out_features).bfloat16()})
    return {f"{prefix}.{name}": tensor.cpu().contiguous() for name, tensor in state.items()}


def tensors_of(config: PreTrainedConfig, device: str) -> Iterator[dict[str, Tensor]]:
    """The tensors of every module that has some, module by module."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    tied = config.tie_word_embeddings
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield quantised(module, path, device)
            continue
        if tied and module is head:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.randn(parameter.shape, device=device, dtype=torch.bfloat16) * STD
            is_norm = parameter.dim() == 1
            yield {f"{path}.{name}": torch.ones_like(value).cpu() if is_norm else value.cpu()}


def build(config: PreTrainedConfig, folder: Path, device: str) -> int:
    """Write the model in shards; returns their number."""
    folder.mkdir(parents=True, exist_ok=True)
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    shard: dict[str, Tensor] = {}
    where: dict[str, str] = {}
    count = 0

    def flush() -> None:
        nonlocal count
        count += 1
        file = f"model-{count:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
        shard.clear()

    for tensors in tensors_of(config, device):
        shard.update(tensors)
        if sum(t.nbytes for t in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="built-in name, or folder or id with a config.json")
    parser.add_argument("--tokenizer", required=True, help="folder or id of a tokenizer whose ids the vocabulary holds")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    built_in = args.config.lower() in BUILT_IN
    config = built_in_config(args.config) if built_in else AutoConfig.from_pretrained(args.config)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"`--tokenizer` must have at most {config.vocab_size} tokens, got {len(tokenizer)}. Take another."
        )
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id, config.dtype = tokenizer.pad_token_id, torch.bfloat16
    shards = build(config, args.output_dir, "cuda" if torch.cuda.is_available() else "cpu")
    tokenizer.save_pretrained(args.output_dir)
    print(f"{shards} shards in {args.output_dir}")


if __name__ == "__main__":
    main()
