"""Accuracy of the small language model on each task, greedy: of a checkpoint in this process, or of a server.

python -m models.tiny.evaluate
python -m models.tiny.evaluate src/fairlead/cli/demo_models/tiny/draft --num 200
python -m models.tiny.evaluate --url http://127.0.0.1:8000/v1 --model tiny --json
"""

import argparse
import json
import os
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from models.tiny.data import TASKS, examples
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from fairlead.cli.demo_models.tiny.checks import CHAT, Example, check, held_out, tool_call_text

MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class Answered:
    example: Example
    text: str

    @property
    def right(self) -> bool:
        return check(self.example, self.text)


def answers_of_checkpoint(folder: Path, asked: list[Example], *, batch_size: int = 64) -> Iterator[Answered]:
    """Answers by transformers, float32; batches of one length together, padded on the left."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [tokenizer.apply_chat_template(one.messages, tools=one.tools, add_generation_prompt=True, tokenize=False) for one in asked]
    by_length = sorted(zip(prompts, asked, strict=True), key=lambda pair: len(pair[0]))
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        inputs = tokenizer([prompt for prompt, _ in batch], add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.inference_mode():
            output_BT = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        texts = tokenizer.batch_decode(output_BT[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        yield from (Answered(example, text) for (_, example), text in zip(batch, texts, strict=True))


def answers_of_server(url: str, model: str, asked: list[Example], *, concurrency: int = 8) -> Iterator[Answered]:
    """Answers by an OpenAI-compatible server; its key, if it wants one, is in OPENAI_API_KEY."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}

    def ask(example: Example) -> Answered:
        body = {"model": model, "messages": example.messages, "temperature": 0.0, "max_tokens": MAX_NEW_TOKENS}
        if example.tools:
            body["tools"] = example.tools
        request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            return Answered(example, said_by(json.load(response)["choices"][0]["message"]))

    with ThreadPoolExecutor(concurrency) as threads:
        yield from threads.map(ask, asked)


def said_by(message: dict[str, Any]) -> str:
    """The message as the model wrote it, also where the server took the tool calls out of the text."""
    functions = [call["function"] for call in message.get("tool_calls") or []]
    calls = [tool_call_text(function["name"], json.loads(function["arguments"])) for function in functions]
    return "\n".join([message.get("content") or "", *calls])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=CHAT, help="checkpoint (default: the package's)")
    parser.add_argument("--url", help="ask this OpenAI-compatible server instead, as http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="tiny", help="name of the model on the server")
    parser.add_argument("--num", type=int, help="this many newly made test examples of each task (default: the 40 that ship)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--task", choices=list(TASKS))
    parser.add_argument("--wrong", action="store_true", help="show the wrong answers")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    tasks = [options.task] if options.task else list(TASKS)
    if options.num:
        asked = [example for task in tasks for example in islice(examples(task, "test", options.seed), options.num)]
    else:
        asked = [example for task in tasks for example in held_out(task)]
    began = time.perf_counter()
    url = options.url and options.url.rstrip("/")
    answered = list(answers_of_server(url, options.model, asked) if url else answers_of_checkpoint(options.folder, asked))
    seconds = time.perf_counter() - began

    right = {task: [one.right for one in answered if one.example.task == task] for task in tasks}
    accuracy = {task: sum(marks) / len(marks) for task, marks in right.items()}
    wrong = [one for one in answered if not one.right] if options.wrong else []
    if options.json:
        faults = [{"prompt": one.example.messages[0]["content"], "expected": one.example.expected, "answer": one.text} for one in wrong]
        print(json.dumps({"accuracy": accuracy, "num_examples": len(asked), "seconds": round(seconds, 2), "wrong": faults}))
        return
    table = Table("task", "examples", "right", title=f"{options.url or options.folder}, {seconds:.1f} s")
    for task, marks in right.items():
        table.add_row(task, str(len(marks)), f"{accuracy[task]:.1%}")
    console = Console()
    console.print(table)
    for one in wrong:
        console.print(
            f"{one.example.task}: {one.example.messages[0]['content']!r}\n  right {one.example.answer!r}\n  said  {one.text!r}",
            markup=False,
        )


if __name__ == "__main__":
    main()
