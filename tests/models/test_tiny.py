"""The small language model that ships: its examples, its tokenizer, and what it gets right."""

import json
import os
import re
import subprocess
import sys
from itertools import islice

import pytest
from models.tiny.data import TASKS, conversations, examples

from fairlead.cli.demo_models.tiny.checks import CHAT, CHECKS, DRAFT, Example, check, held_out, tool_call_text

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

FLOORS: dict[str, float] = {
    "add": 0.9,
    "subtract": 0.85,
    "multiply": 0.85,
    "units": 0.9,
    "sort": 0.8,
    "json": 0.75,
    "tool_call": 0.9,
    "tool_result": 0.9,
    "talk": 0.9,
    "decline": 0.9,
}
"""Least accuracy on the held-out examples below; measured, less what a change of rounding may cost."""
EXAMPLES_PER_TASK = 20


def question(example: Example) -> str:
    return json.dumps([example.messages, example.tools])


def weather_tool() -> dict:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return {"type": "function", "function": {"name": "get_weather", "description": "Weather in a city", "parameters": parameters}}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHAT)


# The examples


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_makes_the_same_examples_again(task):
    first, again, other = (list(islice(examples(task, "train", seed), 50)) for seed in (3, 3, 4))

    assert first == again
    assert first != other


def test_conversations_are_the_same_in_another_process():
    script = "import zlib\nfrom itertools import islice\nfrom models.tiny.data import conversations\n"
    script += "print(zlib.crc32(repr(list(islice(conversations(5), 200))).encode()))"
    sums = {
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": salt}, capture_output=True, text=True, check=True
        ).stdout
        for salt in ("1", "2")
    }

    assert len(sums) == 1


@pytest.mark.parametrize("task", TASKS)
def test_no_test_question_is_trained_on(task):
    trained = {question(example) for example in islice(examples(task, "train", 0), 5000)}
    tested = {question(example) for example in islice(examples(task, "test", 0), 500)}

    assert not trained & tested


def test_a_sum_is_kept_out_of_training_in_every_phrasing_and_order():
    def sums(split):
        return {tuple(sorted(example.answer.split(":")[0].split(" + "))) for example in islice(examples("add", split, 0), 5000)}

    assert not sums("train") & sums("test")


def test_the_working_is_right_at_every_step():
    for task in ("add", "subtract", "multiply", "units"):
        for example in islice(examples(task, "train", 2), 500):
            for step in re.findall(r"(\d[-+*\d]*)=(\d+)", example.answer):
                assert eval(step[0]) == int(step[1]), example.answer


def test_conversations_hold_no_test_question():
    trained = {message["content"] for one in islice(conversations(1), 3000) for message in one.messages if message["role"] == "user"}

    assert not trained & {example.messages[0]["content"] for example in held_out() if not example.tools}


def test_the_held_out_file_holds_forty_of_each_task_and_right_answers():
    for task in CHECKS:
        kept = held_out(task)
        assert len({question(example) for example in kept}) == 40
        assert all(check(example, example.answer) for example in kept)


@pytest.mark.parametrize("task", TASKS)
def test_every_made_answer_passes_its_check_and_another_questions_does_not(task):
    made = list(islice(examples(task, "train", 7), 200))

    assert all(check(example, example.answer) for example in made)
    for example in made:
        wrong = next(other for other in made if other.expected != example.expected)
        assert not check(example, wrong.answer)


# The checks


def example_of(task: str, expected: object) -> Example:
    return Example(task=task, messages=[], answer="", expected=expected)


@pytest.mark.parametrize(
    ("task", "expected", "right", "wrong"),
    [
        ("add", 623, ["348 + 275 = 623", "623", "It is 623."], ["348 + 275 = 624", "623 + 275 = 348", "", "six"]),
        ("subtract", -2, ["3 - 5 = -2"], ["3 - 5 = 2"]),
        ("units", {"value": 2.5, "unit": "km"}, ["2500 m = 2.5 km", "2.50 km."], ["2.5 m", "25 km", "2.5", ""]),
        ("sort", ["7", "18", "41"], ["7, 18, 41", "7,18,41"], ["18, 7, 41", "7, 18", "7, 18, 41, 41", ""]),
        (
            "json",
            {"name": "Ada", "age": 3},
            ['{"age": 3,\n "name": "Ada"}'],
            ['{"name": "Ada", "age": "3"}', '{"name": "Ada", "age": 3, "x": 1}', '{"name": "Ada", "age": true}', "{", "[]"],
        ),
        (
            "tool_call",
            {"name": "f", "arguments": {"x": 1}},
            ['<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', tool_call_text("f", {"x": 1})],
            [tool_call_text("f", {"x": 2}), tool_call_text("g", {"x": 1}), tool_call_text("f", {"x": 1}) * 2, '{"name": "f"}', ""],
        ),
        ("tool_result", ["14", "sunny"], ["It is sunny, 14 degrees."], ["It is sunny, 140 degrees.", "sunny", ""]),
        ("talk", "Goodbye!", ["Goodbye!", " Goodbye!\n"], ["Hello!", ""]),
    ],
)
def test_a_check_passes_what_is_right_and_fails_what_is_wrong(task, expected, right, wrong):
    assert all(check(example_of(task, expected), answer) for answer in right)
    assert not any(check(example_of(task, expected), answer) for answer in wrong)


# The tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces\n\n\tand a tab ",
        "348 + 275 = 623",
        '{"name": "Ada", "age": 34}',
        "naïve café, Zürich, Malmö, Łódź",
        "日本語と中文、한국어",
        "Привет, мир! שלום مرحبا",
        "👩‍👩‍👧‍👦 🇳🇴 e\u0301 \u200b \x00 \ufeff",
        "<|im_start|>user\n<tool_call>hi</tool_call><|im_end|>",
        "don't DON'T it's",
        "a" * 500,
        "\r\n\r\n windows",
    ],
)
def test_the_tokenizer_gives_back_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_each_digit_is_a_token(tokenizer):
    assert [tokenizer.decode([token]) for token in tokenizer("70125")["input_ids"]] == list("70125")


def test_a_tool_call_is_read_though_special_tokens_are_left_out(tokenizer):
    ids = tokenizer("<tool_call>\n{}\n</tool_call><|im_end|>")["input_ids"]

    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call>\n{}\n</tool_call>"


def test_both_models_share_the_tokenizer(tokenizer):
    assert AutoTokenizer.from_pretrained(DRAFT).get_vocab() == tokenizer.get_vocab()
    assert (DRAFT / "tokenizer.json").read_bytes() == (CHAT / "tokenizer.json").read_bytes()


def test_the_chat_template_writes_tools_calls_and_results(tokenizer):
    call = {"id": "call_0", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather in Oslo"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "content": '{"temperature": 14}'},
    ]

    text = tokenizer.apply_chat_template(messages, tools=[weather_tool()], add_generation_prompt=True, tokenize=False)

    assert text == (
        "<|im_start|>system\nBe brief.\n<tools>\nget_weather(city: string): Weather in a city\n</tools><|im_end|>\n"
        "<|im_start|>user\nWeather in Oslo<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n'
        '<|im_start|>tool\n{"temperature": 14}<|im_end|>\n'
        "<|im_start|>assistant\n"
    )


def test_arguments_may_be_an_object_too(tokenizer):
    texts = set()
    for arguments in ('{"city": "Zürich"}', {"city": "Zürich"}):
        call = {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}
        texts.add(tokenizer.apply_chat_template([{"role": "assistant", "content": "", "tool_calls": [call]}], tokenize=False))

    assert len(texts) == 1
    assert tool_call_text("get_weather", {"city": "Zürich"}) in texts.pop()


def test_the_chat_template_refuses_a_role_it_does_not_know(tokenizer):
    with pytest.raises(Exception, match="Unknown role: robot"):
        tokenizer.apply_chat_template([{"role": "robot", "content": "hi"}], tokenize=False)


# The weights


@pytest.fixture(scope="module")
def answers(tokenizer) -> dict[str, list[tuple[Example, str]]]:
    """The chat model's greedy answers to the first held-out examples of each task."""
    from models.tiny.evaluate import answers_of_checkpoint

    asked = [example for task in TASKS for example in held_out(task)[:EXAMPLES_PER_TASK]]
    found: dict[str, list[tuple[Example, str]]] = {task: [] for task in TASKS}
    for one in answers_of_checkpoint(CHAT, asked):
        found[one.example.task].append((one.example, one.text))
    return found


@pytest.mark.parametrize("task", TASKS)
def test_the_model_answers_held_out_questions(answers, task):
    right = sum(check(example, text) for example, text in answers[task])

    assert right / EXAMPLES_PER_TASK >= FLOORS[task]


@pytest.mark.parametrize("folder", [CHAT, DRAFT], ids=lambda folder: folder.name)
def test_a_checkpoint_loads_and_says_where_to_stop(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.tie_word_embeddings


def test_the_draft_is_much_smaller_and_both_are_small():
    sizes = {folder: (folder / "model.safetensors").stat().st_size for folder in (CHAT, DRAFT)}

    assert sizes[DRAFT] * 4 < sizes[CHAT]
    assert sum(sizes.values()) < 25_000_000
