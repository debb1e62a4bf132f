"""torchtitan's trainer, with the shape of Llama-3.2-1B among its models; its arguments are torchtitan's.

torchrun --standalone --nproc-per-node 1 benchmarks/titan_train.py --model.flavor 1B ...
"""

from torchtitan.models.llama3 import TransformerModelArgs, llama3_args
from torchtitan.train import Trainer, main

llama3_args["1B"] = TransformerModelArgs(
    dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, ffn_dim_multiplier=1.5, vocab_size=32000, rope_theta=500000
)

if __name__ == "__main__":
    main(Trainer)
