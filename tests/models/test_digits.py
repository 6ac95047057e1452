"""How the small image model learns: its captions, its tokenizer, and the pipeline that its training writes."""

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
from models.digits.captions import WORDS, caption, every_word
from models.digits.tokenizer import MAX_LENGTH, make_tokenizer
from models.digits.train import Painter, learn, make_scheduler, make_text_encoder, make_vae, order, save

from fairlead.cli.demo_models.digits import MODEL
from fairlead.cli.demo_models.digits.pictures import COLOURS, SIZES
from fairlead.core.generation import Paint
from fairlead.core.pictures import check
from fairlead.core.specs import DiffusionSpec
from fairlead.diffusion.load import load_family


def test_a_caption_names_the_digit_and_whatever_is_not_usual() -> None:
    rng = Random(0)
    for number in range(500):
        digit = number % 10
        text, colour, size = caption(digit, rng)
        words = set(text.replace(",", "").split())
        names = {WORDS[digit], str(digit)}
        assert len(words & names) == 1, text
        assert (colour in words) or (colour == "black" and not words & set(COLOURS)), text
        assert (size in words) or (size == "medium" and not words & set(SIZES)), text
        assert "a eight" not in text and "an one" not in text and "a orange" not in text
        assert words - {str(digit)} <= set(every_word())


def test_captions_are_the_same_in_every_process() -> None:
    script = "from random import Random; from models.digits.captions import caption; rng = Random(5); print([caption(3, rng) for _ in range(20)])"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_the_words_of_captions_are_a_token_each_and_any_text_is_some_tokens() -> None:
    tokenizer = make_tokenizer()
    assert all(len(tokenizer.tokenize(word)) == 1 for word in every_word())
    unknown = tokenizer("A Zebra, «ünïcode» 数字 7!").input_ids
    assert tokenizer.unk_token_id not in unknown[1:-1]
    assert len(tokenizer("seven " * 100, truncation=True).input_ids) == MAX_LENGTH


def test_the_tokenizer_that_ships_is_the_one_that_is_made() -> None:
    from transformers import CLIPTokenizer

    shipped = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    assert shipped.get_vocab() == make_tokenizer().get_vocab()
    assert shipped.model_max_length == MAX_LENGTH


def test_an_order_takes_each_number_once_before_any_again() -> None:
    batches = list(islice(order(130, torch.Generator().manual_seed(0)), 4))
    assert [len(batch) for batch in batches] == [64] * 4
    assert len(set(torch.cat(batches[:2]).tolist())) == 128


def test_learning_brings_the_loss_down_and_gives_a_mean_of_the_last_weights(capsys: pytest.CaptureFixture[str]) -> None:
    line = torch.nn.Linear(1, 1)
    x = torch.linspace(-1, 1, 64)[:, None]
    mean = learn(line, lambda: torch.nn.functional.mse_loss(line(x), 3 * x), name="a line", num_steps=200, rate=0.2)
    assert isinstance(mean, torch.nn.Linear)
    assert not torch.equal(mean.weight, line.weight)
    assert abs(line.weight.item() - 3) < 0.1
    assert "step 200" in capsys.readouterr().out


def test_what_training_writes_is_a_pipeline_that_loads(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    folder = tmp_path / "1"
    make_vae().half().save_pretrained(folder / "vae")
    save(Painter(make_text_encoder(tokenizer)), tokenizer, make_scheduler(), folder)
    family = load_family(folder, DiffusionSpec())
    assert (family.info.width, family.info.height, family.info.has_negative) == (32, 32, True)
    assert family.encode(check(Paint(text="a seven", seed=1), family.info), None).latents.shape == (1, 4, 8, 8)
