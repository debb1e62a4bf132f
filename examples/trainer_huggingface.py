"""Train a Llama with Hugging Face's Trainer and ``backend="sste"``.

    pip install transformers accelerate
    python examples/trainer_huggingface.py                  # a GPU: 8 layers of Llama-3.2-1B's shape, in bf16 autocast
    python examples/trainer_huggingface.py --steps 100      # no GPU: a tiny Llama, its kernels are emulated

The backend needs one line, ``model.compile(backend="sste")``.  The model stays a ``LlamaForCausalLM``, so the trainer
saves it, loads it and resumes as before.  With several GPUs, start the script with torchrun.  The text is the source
code of Python's standard library, read byte by byte.

Expect a loss that falls from 5.5, the table of what was rewritten (the FFN in 2:4 FP8, attention in FP8, the head
dense), and the speed.  The first step is slow: it compiles.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import sparse_compile


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The standard library's source as windows of ``context`` bytes."""

    def __init__(self, context: int) -> None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        self.bytes = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
        self.context = context

    def __len__(self) -> int:
        return len(self.bytes) // self.context

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.bytes[index * self.context : (index + 1) * self.context].long()
        return {"input_ids": ids, "labels": ids}  # the model shifts the labels itself


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", default="out/trainer_huggingface", help="folder of the trainer's checkpoints")
    args = parser.parse_args(argv)

    on_gpu = torch.cuda.is_available()
    context, batch = (2048, 8) if on_gpu else (64, 8)
    if on_gpu:
        shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8}
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    else:
        shape = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    # Without a Hopper GPU nothing would be rewritten. "always" emulates the kernels, slowly, and "eager" needs no C++
    # compiler. On a GPU leave both out: then what is measured to be faster is rewritten.
    options = {} if on_gpu else {"sste.when": "always", "sste.executor": "eager"}

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=context, **shape, **heads))
    model.compile(backend="sste", options=options)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=batch,
            learning_rate=3e-4 if on_gpu else 3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 10,
            bf16=on_gpu,
            logging_steps=max(1, args.steps // 8),
            save_strategy="no",  # "steps" writes checkpoints, from which train(resume_from_checkpoint=True) goes on
            dataloader_pin_memory=on_gpu,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Windows(context),
    )
    trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    report = sparse_compile.report()
    print(f"\n{report}\n\nloss: {losses[0]:.3f} -> {losses[-1]:.3f}")
    if step := report.step():  # without steps that compile
        print(f"{batch * context / step.median * 1e3:,.0f} tokens a second" + ("" if on_gpu else " (emulated)"))


if __name__ == "__main__":
    main()
