"""What PyTorch reaches on the card that `wgpu-llava bench` is run on: products by cuBLAS, attention, and a step of 7B by
QLoRA (PEFT, bitsandbytes) with random weights. One JSON object to standard output.

    python3 benches/pytorch/bench.py [--only matmul,attention,step] [--layers 32] [--seq 2048] [--rank 64] > FILE.json

Beside it, on the same machine: wgpu-llava bench step --model llama-7b --method qlora --set r=64 --precision float16
--gradient-checkpointing full --batch 1 --seq 2048. Needs torch with CUDA, transformers, peft, bitsandbytes."""

import argparse
import json
import statistics
import sys
import time

import torch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def seconds(run, rounds=20, repeats=10):
    """Median seconds of one `run`, by events around `repeats` of it."""
    for _ in range(3):
        run()
    taken = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3 / repeats)
    return statistics.median(taken)


def matmul():
    """C = A B^T, as a linear layer does it."""
    rows = []
    for m, n, k in ((4096, 4096, 4096), (2048, 4096, 4096), (2048, 11008, 4096), (2048, 4096, 11008)):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            a, b = (torch.randn(rows_of, k, device="cuda", dtype=dtype) for rows_of in (m, n))
            took = seconds(lambda: a @ b.T)
            rows.append({"shape": f"{m}x{k} by {n}x{k}", "dtype": str(dtype), "seconds": took, "flops_per_second": 2 * m * n * k / took})
    return rows


def attention(heads=32, length=2048, head_dim=128):
    """Causal attention in f16: FlashAttention 2, and what PyTorch takes when it may choose."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows = []
    query, key, value = (torch.randn(1, heads, length, head_dim, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    for name, backends in (("flash", [SDPBackend.FLASH_ATTENTION]), ("chosen by PyTorch", [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION])):
        with sdpa_kernel(backends):
            forward = seconds(lambda: attend(query, key, value, is_causal=True))
            out = attend(query, key, value, is_causal=True)
            d_out = torch.randn_like(out)
            backward = seconds(lambda: torch.autograd.grad(out, (query, key, value), d_out, retain_graph=True))
        # Two products forward and five backward, half of each masked.
        product = 2 * length * length * heads * head_dim / 2
        rows.append({"backend": name, "forward": forward, "forward_flops_per_second": 2 * product / forward, "backward": backward, "backward_flops_per_second": 5 * product / backward})
    return rows


def quantized_llama(layers):
    """7B with random weights in bfloat16, its decoder's linears in NF4 with nested factors."""
    import bitsandbytes
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32, vocab_size=32000, max_position_embeddings=2048, use_cache=False)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                linear = bitsandbytes.nn.Linear4bit(child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True, device="meta")
                linear.weight = bitsandbytes.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True).cuda()
                setattr(parent, name, linear)
    return model


def step(layers, seq, rank, adapters_in_f32):
    """Forward, backward and AdamW of one sequence, everything checkpointed; the median of ten after three."""
    from peft import LoraConfig, get_peft_model

    model = quantized_llama(layers)
    model.requires_grad_(False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, lora_dropout=0.0), autocast_adapter_dtype=adapters_in_f32)
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)
    tokens = torch.randint(0, 32000, (1, seq), device="cuda")
    taken, losses = [], []
    # Loading holds bfloat16 and NF4 at once.
    torch.cuda.reset_peak_memory_stats()
    for _ in range(13):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=adapters_in_f32):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
        losses.append(loss.item())
    took = statistics.median(taken[3:])
    result = {
        "adapters": str(weights[0].dtype), "layers": layers, "seq": seq, "rank": rank, "trained": sum(p.numel() for p in weights),
        "attention": model.config._attn_implementation, "seconds": taken[3:], "seconds_per_step": took, "tokens_per_second": seq / took,
        "losses": losses, "bytes": torch.cuda.max_memory_allocated(),
    }
    del model, optimizer, weights
    torch.cuda.empty_cache()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="matmul,attention,step")
    for name, default in (("layers", 32), ("seq", 2048), ("rank", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    told = {"command": " ".join(["python3", *sys.argv]), "device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda, "date": time.strftime("%Y-%m-%d")}
    only = args.only.split(",")
    if "matmul" in only:
        told["matmul"] = matmul()
    if "attention" in only:
        told["attention"] = attention()
    if "step" in only:
        import bitsandbytes
        import peft
        import transformers

        told.update(transformers=transformers.__version__, peft=peft.__version__, bitsandbytes=bitsandbytes.__version__)
        told["step"] = [step(args.layers, args.seq, args.rank, in_f32) for in_f32 in (True, False)]
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
