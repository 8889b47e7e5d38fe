"""KFAC in the Trainer of Transformers: a small Llama learns to add.

``pip install transformers accelerate``. The model returns its loss, so that KFAC needs the model
alone. The tokens of "37+45=082" are its characters; only those of the sum are labelled.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from tempfile import TemporaryDirectory

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from einconv_kfac import KFAC

SYMBOLS = "0123456789+="
Example = dict[str, torch.Tensor]


def tokens(text: str) -> torch.Tensor:
    """Return the index of each character."""
    return torch.tensor([SYMBOLS.index(character) for character in text])


def example(first: int, second: int) -> Example:
    """Return a sum of two digits each, written with its last digit first."""
    text = tokens(f"{first:02}+{second:02}=" + f"{first + second:03}"[::-1])
    labels = text.clone()
    labels[:6] = -100
    return {"input_ids": text, "labels": labels}


def sums(count: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Return different sums to learn from, and 200 others to test with."""
    pairs = [(first, second) for first in range(100) for second in range(100)]
    random.Random(seed).shuffle(pairs)
    chosen = [example(*pair) for pair in pairs[: count + 200]]
    return chosen[:count], chosen[count:]


def build_model(seed: int) -> LlamaForCausalLM:
    """Return a Llama of two layers."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(SYMBOLS),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=None,
        )
    )


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, examples: Sequence[Example]) -> float:
    """Return the share of digits of sums that are predicted."""
    model.eval()
    text = torch.stack([row["input_ids"] for row in examples])
    predicted = model(input_ids=text).logits[:, 5:-1].argmax(-1)
    return float((predicted == text[:, 6:]).float().mean())


def main(arguments: Sequence[str] | None = None) -> float:
    """Train; print and return the accuracy on other sums."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=150, help="training steps (150)")
    parser.add_argument("--sums", type=int, default=3000, help="sums to learn from (3000)")
    options = parser.parse_args(arguments)
    train, test = sums(options.sums, seed=0)
    model = build_model(seed=0)
    with TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=128,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
        )
        Trainer(model, settings, train_dataset=train, optimizers=(KFAC(model), None)).train()
    share = accuracy(model, test)
    print(f"{share:.1%} of the digits of sums that were not seen are right")
    return share


if __name__ == "__main__":
    main()
