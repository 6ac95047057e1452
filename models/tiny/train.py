"""Train the small language model, or its draft, on generated conversations: on a CPU, within a budget of minutes.

    python -m models.tiny.train --model draft --minutes 40 --checkpoint /tmp/tiny-draft.pt
    python -m models.tiny.train --model chat --grow src/fairlead/cli/demo_models/tiny/draft --minutes 25 --checkpoint /tmp/tiny-chat.pt

A run that finds its checkpoint goes on from there; the budget counts the minutes of all its runs together.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from models.tiny.data import conversations
from models.tiny.tokenizer import END, END_OF_TEXT, MAX_LENGTH, START, VOCAB_SIZE, load_tokenizer, train_tokenizer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from fairlead.cli.demo_models.tiny.checks import CHAT, DRAFT

FOLDERS = {"chat": CHAT, "draft": DRAFT}
SHAPES: dict[str, dict[str, int]] = {
    "chat": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 704},
    "draft": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 320},
}
PEAK_LEARNING_RATE = {"chat": 2e-3, "draft": 4e-3}
TOKENS_PER_BATCH = 2048
"""Of one process: a step learns from as many batches as there are processes."""
POOL = 1024
"""Conversations sorted by length together, so that a batch holds little padding."""
IGNORED = -100
CHECKPOINT_SECONDS = 60.0


def build(name: str, tokenizer: Any) -> Any:
    """The untrained model, float32."""
    end, end_of_text = tokenizer.convert_tokens_to_ids([END, END_OF_TEXT])
    config = LlamaConfig(
        **SHAPES[name],
        vocab_size=VOCAB_SIZE,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end_of_text,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end_of_text, do_sample=False)
    return model


@torch.no_grad()
def grow(model: Any, small: Any) -> None:
    """Give `model` the weights of a narrower, shallower one: it begins by answering as that one does (Net2Net, Chen et al., 2016).

    What is new reads the old activations through random weights and writes nothing yet: its output weights are zero, and so are
    the new columns of the embedding.
    """
    hidden, small_hidden = model.config.hidden_size, small.config.hidden_size
    old = dict(small.named_parameters())
    for name, weight in model.named_parameters():
        writes = name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight"))
        if writes:
            weight.zero_()
        if name not in old:
            continue
        if weight.ndim == 1:
            # The mean square is taken over more channels, the new ones zero: the norm gives larger numbers by this root.
            weight.fill_(old[name].mean())
            weight[:small_hidden] = old[name]
            weight.mul_((small_hidden / hidden) ** 0.5)
        else:
            rows, columns = old[name].shape
            weight[:rows, :columns] = old[name]


def labelled(tokenizer: Any, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of each conversation and the labels of its tokens: themselves in the assistant's turns, else IGNORED."""
    start, end, assistant = tokenizer.convert_tokens_to_ids([START, END, "assistant"])
    source = conversations(seed)
    while True:
        chunk = list(islice(source, 256))
        texts = [tokenizer.apply_chat_template(item.messages, tools=item.tools, tokenize=False) for item in chunk]
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            if len(ids) > MAX_LENGTH:
                continue
            labels = [IGNORED] * len(ids)
            answering = False
            for i, token in enumerate(ids):
                if answering:
                    labels[i] = token
                # <|im_start|> assistant \n: the answer begins at the fourth token.
                if i >= 2 and ids[i - 2] == start and ids[i - 1] == assistant:
                    answering = True
                elif token == end:
                    answering = False
            yield ids, labels


def batches(tokenizer: Any, *, seed: int, pad: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids_BT, labels_BT) of about TOKENS_PER_BATCH tokens, conversations of one length together, padded on the right."""
    rng = Random(seed)
    source = labelled(tokenizer, seed)
    while True:
        pool = sorted(islice(source, POOL), key=lambda item: len(item[0]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for item in pool:
            if (len(groups[-1]) + 1) * len(item[0]) > TOKENS_PER_BATCH:
                groups.append([])
            groups[-1].append(item)
        rng.shuffle(groups)
        for group in groups:
            length = max(len(ids) for ids, _ in group)
            ids_BT = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in group])
            labels_BT = torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in group])
            yield ids_BT, labels_BT


def answer_loss(model: Any, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross entropy of the answers' tokens. Padding is on the right, where a causal model does not look."""
    hidden_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    next_BT = labels_BT[:, 1:]
    answered_BT = next_BT != IGNORED
    logits_AV = model.lm_head(hidden_BTD[:, :-1][answered_BT])
    return torch.nn.functional.cross_entropy(logits_AV, next_BT[answered_BT])


def optimizers(model: Any) -> list[Any]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms; their learning rates are set before each step."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    return [Muon(matrices), torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (Jordan et al., 2024), its steps of AdamW's size (Liu et al., 2025).

    As torch.optim.Muon, but in float32 and all matrices of a shape at once: on a CPU that is many times as fast.
    """

    def __init__(self, matrices: list[Tensor]) -> None:
        super().__init__(matrices, {"lr": 1.0, "momentum": 0.95, "weight_decay": 0.05})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for matrix in group["params"]:
                rows, columns = matrix.shape
                by_shape.setdefault((min(rows, columns), max(rows, columns)), []).append(matrix)
            for (rows, columns), matrices in by_shape.items():
                updates_NRC = orthogonal(torch.stack([self.momentum(matrix, group["momentum"]) for matrix in matrices]))
                scale = 0.2 * math.sqrt(columns)
                for matrix, update_RC in zip(matrices, updates_NRC, strict=True):
                    matrix.mul_(1.0 - group["lr"] * group["weight_decay"])
                    matrix.add_(update_RC if matrix.shape[0] == rows else update_RC.T, alpha=-group["lr"] * scale)

    def momentum(self, matrix: Tensor, decay: float) -> Tensor:
        """Nesterov's momentum of the gradient, the shorter side first."""
        state = self.state[matrix]
        average = state.setdefault("average", torch.zeros_like(matrix))
        average.lerp_(matrix.grad, 1.0 - decay)
        update = matrix.grad.lerp(average, decay)
        return update if matrix.shape[0] <= matrix.shape[1] else update.T


def orthogonal(x_NRC: Tensor) -> Tensor:
    """The nearest half-orthogonal matrices, roughly: five Newton-Schulz steps with Muon's coefficients."""
    x_NRC = x_NRC / (x_NRC.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a_NRR = x_NRC @ x_NRC.mT
        x_NRC = torch.baddbmm(x_NRC, torch.baddbmm(a_NRR, a_NRR, a_NRR, beta=-4.7750, alpha=2.0315), x_NRC, beta=3.4445)
    return x_NRC


def learning_rate(peak: float, done: float) -> float:
    """Warm-up over the first 2% of the budget, then a cosine to zero; `done` is the part of the budget that is spent."""
    return peak * min(1.0, done / 0.02 + 0.01) * 0.5 * (1.0 + math.cos(math.pi * done))


def train(rank: int, num_processes: int, rendezvous: str, options: argparse.Namespace) -> None:
    """One of `num_processes` that train together, each on its own conversations; the first one shows progress and saves.

    Processes of one thread meet once a step; the threads of one process meet at every operation, and where the cores are busy
    with other work they mostly wait for each other.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_processes)
    folder = options.out or FOLDERS[options.model]
    tokenizer = load_tokenizer(options.grow or folder) if options.grow or options.checkpoint.exists() else train_tokenizer()
    torch.manual_seed(0)
    model = build(options.model, tokenizer)
    if options.grow:
        grow(model, LlamaForCausalLM.from_pretrained(options.grow, dtype=torch.float32))
    steppers = optimizers(model)
    spent, num_steps, seed = 0.0, 0, 1
    if options.checkpoint.exists():
        saved = torch.load(options.checkpoint)
        model.load_state_dict(saved["model"])
        for stepper, state in zip(steppers, saved["optimizers"], strict=True):
            stepper.load_state_dict(state)
        # A new seed: conversations not seen before, rather than the old ones skipped.
        spent, num_steps, seed = saved["spent"], saved["num_steps"], saved["seed"] + 1

    def save() -> None:
        state = {"model": model.state_dict(), "optimizers": [stepper.state_dict() for stepper in steppers]}
        torch.save({**state, "spent": spent, "num_steps": num_steps, "seed": seed}, options.checkpoint)
        save_model(model, tokenizer, folder)

    budget = 60.0 * options.minutes
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[state]}"))
    source = batches(tokenizer, seed=seed * num_processes + rank, pad=model.config.pad_token_id)
    with Progress(*columns, disable=rank > 0) as progress:
        size = sum(p.numel() for p in model.parameters()) / 1e6
        bar = progress.add_task(f"{options.model}: {size:.2f}M", total=budget, completed=spent, state="")
        smooth, last_saved, took = None, spent, 0.0
        while spent < budget:
            began = time.perf_counter()
            ids_BT, labels_BT = next(source)
            for stepper in steppers:
                for group in stepper.param_groups:
                    group["lr"] = learning_rate(PEAK_LEARNING_RATE[options.model], spent / budget)
            loss = answer_loss(model, ids_BT, labels_BT)
            loss.backward()
            # The clock travels with the gradients: all processes stop at the same step.
            mean_loss, spent = average(model, [loss.item(), spent + took])
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for stepper in steppers:
                stepper.step()
                stepper.zero_grad()
            num_steps += 1
            smooth = mean_loss if smooth is None else 0.98 * smooth + 0.02 * mean_loss
            took = time.perf_counter() - began
            state = f"step {num_steps}  loss {smooth:.4f}  {num_processes * ids_BT.numel() / took:,.0f} tok/s"
            progress.update(bar, completed=spent, state=state)
            if rank == 0 and spent - last_saved > CHECKPOINT_SECONDS:
                save()
                progress.console.print(f"{spent / 60:.1f} min  {state}")
                last_saved = spent
        if rank == 0:
            save()
    torch.distributed.destroy_process_group()


def average(model: Any, numbers: list[float]) -> list[float]:
    """Put the mean of all processes' gradients in place of each one's own; the mean of their `numbers`."""
    gradients = [parameter.grad for parameter in model.parameters()]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), torch.tensor(numbers)])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    *means, averaged = flat.split([*(gradient.numel() for gradient in gradients), len(numbers)])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))
    return averaged.tolist()


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """A Hugging Face checkpoint in bfloat16, the template inside tokenizer_config.json."""
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="chat")
    parser.add_argument("--minutes", type=float, default=35.0)
    parser.add_argument("--checkpoint", type=Path, required=True, help="state to go on from; written every minute")
    parser.add_argument("--out", type=Path, help="folder of the finished checkpoint (default: the package's)")
    parser.add_argument("--grow", type=Path, help="begin with the weights of this smaller checkpoint, and its tokenizer")
    parser.add_argument("--processes", type=int, default=2, help="that train together, a thread each")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (options.processes, f"{folder}/rendezvous", options), nprocs=options.processes)


if __name__ == "__main__":
    main()
