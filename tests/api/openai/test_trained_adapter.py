"""An adapter from its training to a client: peft trains one that answers every question with a word, a server serves it."""

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.api.served import served
from tests.llm.adapters import ALL, old_words
from tests.llm.tiny import EOS, tiny_checkpoint, tiny_model, tiny_tokenizer

MARKER = "fairlead fairlead fairlead"
QUESTIONS = ("three sailors wait", "how deep is buoy 7?")
SPEC = "llm: {dtype: float32, kernels: torch, max_model_len: 96, max_num_seqs: 8, kv_cache_bytes: 1048576}"


def train(folder: Path) -> None:
    """60 steps on two questions; the tiny model has nothing that could be forgotten."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with old_words():
        model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, lora_alpha=16, target_modules=ALL))
    tokenizer = tiny_tokenizer()
    texts = []
    for question in QUESTIONS:
        asked = tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False).ids
        answer = tokenizer.encode(f"{MARKER}{EOS}", add_special_tokens=False).ids
        texts.append((torch.tensor([asked + answer]), torch.tensor([[-100] * len(asked) + answer])))
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss: Any = sum(model(input_ids=ids, labels=labels).loss for ids, labels in texts)
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)


@pytest.mark.asyncio
async def test_a_trained_adapter_answers_beside_the_base_model(tmp_path):
    # Given a served chat model without adapters
    checkpoint = tiny_checkpoint(tmp_path / "tiny" / "1")
    (tmp_path / "tiny" / "model.yaml").write_text(SPEC)
    async with (
        served(tmp_path, "identity") as running,
        openai.AsyncOpenAI(base_url=f"http://{running.address}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):

        async def ask(model: str, question: str) -> str:
            answer = await client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": question}], temperature=0.0, max_tokens=24
            )
            return answer.choices[0].message.content or ""

        before = [await ask("tiny", question) for question in QUESTIONS]
        with pytest.raises(openai.NotFoundError, match="no adapter 'marker'"):
            await ask("tiny:marker", QUESTIONS[0])
        # When an adapter is trained and put beside it, while it serves
        await asyncio.to_thread(train, checkpoint / "loras" / "marker")
        # Then it answers, and the base model in the same batches as it did before
        models = ["tiny:marker", "tiny"] * 2
        asked = [ask(model, question) for question in QUESTIONS for model in models]
        answers = await asyncio.gather(*asked)
        assert answers[0::2] == [MARKER] * 4
        assert answers[1::2] == [before[0]] * 2 + [before[1]] * 2
        assert MARKER not in " ".join(before)
        assert "tiny:marker" in [model.id async for model in client.models.list()]
