"""Chat examples with checkable answers, made from a seed: what the small language model learns, and is tested on.

A task makes one `Draft` from a random generator. Its key names what is asked, whatever the phrasing; keys whose hash falls
in one of ten parts are kept for tests, so no question of the test split is ever trained on, in any phrasing.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from models.tiny import words

from fairlead.cli.demo_models.tiny.checks import FOLDER, Example, tool_call_text

Split = Literal["train", "test"]
Tool = dict[str, Any]
Message = dict[str, Any]

HELLO = "Hello! Ask me for a sum, a unit conversion, a sorted list, JSON from a sentence or a tool call."
I_AM = "I am a small demonstration model of Fairlead. I can do sums, convert units, sort lists, extract JSON and call tools."
I_CAN = "I can add, subtract and multiply small numbers, convert units, sort short lists, extract JSON from a sentence and call tools."
DO_NOT_KNOW = "I do not know that. I only know small sums, unit conversion, sorting, JSON extraction and tool calls."
TOO_LARGE = "That is too large for me. I add and subtract numbers up to 999, and multiply one digit by two digits."


@dataclass(frozen=True)
class Draft:
    """An example before its split is known."""

    key: str
    prompt: str
    answer: str
    expected: Any
    tools: list[Tool] | None = None
    before: tuple[Message, ...] = ()
    """Turns between the prompt and the answer: a tool call and its result."""


def examples(task: str, split: Split, seed: int) -> Iterator[Example]:
    """Examples of one task without end; the same for the same seed."""
    rng = Random(f"{task}-{split}-{seed}")
    while True:
        draft = TASKS[task](rng)
        if split_of(f"{task}:{draft.key}") == split:
            messages = [{"role": "user", "content": draft.prompt}, *draft.before]
            yield Example(task=task, messages=messages, answer=draft.answer, expected=draft.expected, tools=draft.tools)


def split_of(key: str) -> Split:
    return "test" if zlib.crc32(key.encode()) % 10 == 0 else "train"


@dataclass(frozen=True)
class Conversation:
    """Examples asked one after the other, answers included."""

    messages: list[Message]
    tools: list[Tool] | None


def conversations(seed: int) -> Iterator[Conversation]:
    """Training text: one to four examples in a row, now and then many; tools and a system message for some."""
    rng = Random(f"conversations-{seed}")
    sources = {task: examples(task, "train", seed) for task in TASKS}
    while True:
        num_examples = rng.choices((1, 2, 3, 4, 22), weights=(50, 20, 15, 14, 1))[0]
        names = rng.choices(list(SHARES), weights=list(SHARES.values()), k=num_examples)
        turns = with_at_most_one_set_of_tools([next(sources[name]) for name in names])
        tools = next((turn.tools for turn in turns if turn.tools), None)
        if tools is None and rng.random() < 0.1:
            tools = some_tools(rng, make_tool(rng, rng.choice(TOOLS)))
            turns = [turn for turn in turns if not might_call(turn)]
        messages: list[Message] = []
        if rng.random() < 0.15:
            messages.append({"role": "system", "content": fill(rng, rng.choice(words.SYSTEMS))})
        for turn in turns:
            messages += [*turn.messages, {"role": "assistant", "content": turn.answer}]
        if turns:
            yield Conversation(messages, tools)


def with_at_most_one_set_of_tools(turns: list[Example]) -> list[Example]:
    first = next((turn for turn in turns if turn.tools), None)
    if first is None:
        return turns
    return [turn for turn in turns if turn is first or not (turn.tools or might_call(turn))]


def might_call(turn: Example) -> bool:
    """Declined without tools, but perhaps to be answered with them."""
    return turn.task == "decline" and bool(CALLING.search(turn.messages[0]["content"]))


CALLING = re.compile(r"weather|time|message|letter|music|song|flight|find|tell me|about|money|film|hotel", re.IGNORECASE)


# Phrasing


def said(rng: Random, text: str, end: str = "") -> str:
    """A request as people type it: with or without its last mark, a capital, a please."""
    if rng.random() < 0.15:
        text = rng.choice(("Please ", "please ", "Can you ", "Now ", "Ok, ")) + text[0].lower() + text[1:]
    elif rng.random() < 0.15:
        text = text[0].lower() + text[1:]
    return text + rng.choice((end, end, end, ""))


def fill(rng: Random, template: str) -> str:
    """The template with words in its holes, a new one for each."""
    choices = {
        "topic": words.TOPICS,
        "country": words.COUNTRIES,
        "city": words.CITIES,
        "name": words.NAMES,
        "word": words.WORDS,
        "language": words.LANGUAGES,
        "day": words.DAYS,
    }
    return re.sub(r"{(\w+)}", lambda hole: rng.choice(choices[hole[1]]), template)


CONSONANTS = ("b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z", "th", "sh", "br", "st", "kr")


def made_up(rng: Random) -> str:
    """A name nobody has: what is extracted must be copied, not known."""
    syllables = (rng.choice(CONSONANTS) + rng.choice("aeiou") for _ in range(rng.choice((1, 2, 2))))
    return ("".join(syllables) + rng.choice(("", "n", "r", "l", "s", "ck", "x"))).capitalize()


def a_name(rng: Random) -> str:
    return made_up(rng) if rng.random() < 0.2 else rng.choice(words.NAMES)


def a_city(rng: Random) -> str:
    return made_up(rng) if rng.random() < 0.2 else rng.choice(words.CITIES)


# Arithmetic as at school: a column at a time from the right, so that each step is a fact small enough to learn

ADD = ("{a} + {b}", "{a} + {b} =", "{a}+{b}", "What is {a} + {b}?", "What is {a} plus {b}?", "Add {a} and {b}", "Sum of {a} and {b}",
       "Calculate {a} + {b}", "How much is {a} plus {b}?", "I have {a} apples and get {b} more. How many apples do I have?")  # fmt: skip
SUBTRACT = ("{a} - {b}", "{a} - {b} =", "{a}-{b}", "What is {a} - {b}?", "What is {a} minus {b}?", "Subtract {b} from {a}",
            "Calculate {a} - {b}", "How much is {a} minus {b}?", "I have {a} apples and eat {b}. How many are left?")  # fmt: skip
MULTIPLY = ("{a} * {b}", "{a} * {b} =", "{a}*{b}", "{a} x {b}", "What is {a} * {b}?", "What is {a} times {b}?", "Multiply {a} by {b}",
            "Calculate {a} * {b}", "How much is {a} times {b}?", "Product of {a} and {b}")  # fmt: skip


def a_number(rng: Random) -> int:
    return rng.randrange(rng.choices((10, 100, 1000), weights=(1, 4, 5))[0])


def columns(a: int, b: int) -> list[tuple[int, int]]:
    """The digits of both numbers, the last ones first; the shorter number begins with zeros."""
    width = max(len(str(a)), len(str(b)))
    return [(int(x), int(y)) for x, y in zip(f"{a:0{width}}"[::-1], f"{b:0{width}}"[::-1], strict=True)]


def aligned(a: int, b: int, sign: str) -> str:
    width = max(len(str(a)), len(str(b)))
    return f"{a:0{width}} {sign} {b:0{width}}"


def add(rng: Random) -> Draft:
    a, b = a_number(rng), a_number(rng)
    prompt = said(rng, rng.choice(ADD).format(a=a, b=b))
    return Draft(f"{min(a, b)},{max(a, b)}", prompt, worked_sum(a, b), a + b)


def worked_sum(a: int, b: int) -> str:
    """`348 + 275: 8+5=13, 4+7+1=12, 3+2+1=6, so 623`"""
    steps, carry = [], 0
    for x, y in columns(a, b):
        total = x + y + carry
        steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = total // 10
    return f"{aligned(a, b, '+')}: {', '.join(steps)}, so {a + b}"


def subtract(rng: Random) -> Draft:
    b, a = sorted((a_number(rng), a_number(rng)))
    prompt = said(rng, rng.choice(SUBTRACT).format(a=a, b=b))
    return Draft(f"{a},{b}", prompt, worked_difference(a, b), a - b)


def worked_difference(a: int, b: int) -> str:
    """`905 - 378: 15-8=7, 10-7-1=2, 9-3-1=5, so 527`: ten is borrowed where the column needs it."""
    steps, borrowed = [], 0
    for x, y in columns(a, b):
        needs = x - y - borrowed < 0
        steps.append(f"{x + 10 * needs}-{y}{'-1' if borrowed else ''}={x + 10 * needs - y - borrowed}")
        borrowed = int(needs)
    return f"{aligned(a, b, '-')}: {', '.join(steps)}, so {a - b}"


def multiply(rng: Random) -> Draft:
    a, b = rng.randrange(10), rng.randrange(10 if rng.random() < 0.2 else 100)
    if rng.random() < 0.5:
        a, b = b, a
    prompt = said(rng, rng.choice(MULTIPLY).format(a=a, b=b))
    return Draft(f"{min(a, b)},{max(a, b)}", prompt, f"{a} * {b}{worked_product(max(a, b), min(a, b))}{a * b}", a * b)


def worked_product(number: int, digit: int) -> str:
    """The steps of `46 * 7: 6*7=42, 4*7=28, 28+4=32, so `; of one digit `: 6*7=42, so `."""
    if number < 10:
        return f": {number}*{digit}={number * digit}, so "
    tens, ones = divmod(number, 10)
    last, first = ones * digit, tens * digit
    carried = f", {first}+{last // 10}={first + last // 10}" if last > 9 else ""
    return f": {ones}*{digit}={last}, {tens}*{digit}={first}{carried}, so "


# Units

POWERS = (("km", "m", 1000), ("m", "cm", 100), ("cm", "mm", 10), ("kg", "g", 1000), ("l", "ml", 1000))
FACTORS = (("minutes", "seconds", 60, 30), ("hours", "minutes", 60, 30), ("weeks", "days", 7, 50), ("days", "hours", 24, 9),
           ("years", "months", 12, 9), ("feet", "inches", 12, 9))  # fmt: skip
"""(unit, smaller unit, how many, the most that is asked for)"""
CONVERT = ("Convert {q} {unit} to {to}", "How many {to} are {q} {unit}?", "What is {q} {unit} in {to}?", "{q} {unit} in {to}",
           "{q} {unit} to {to}", "How many {to} are in {q} {unit}?", "Express {q} {unit} in {to}", "Change {q} {unit} to {to}")  # fmt: skip


def units(rng: Random) -> Draft:
    return by_power(rng) if rng.random() < 0.6 else by_factor(rng)


def by_power(rng: Random) -> Draft:
    unit, to, factor = rng.choice(POWERS)
    tenths = rng.randint(1, 99) if rng.random() < 0.3 else 10 * rng.randint(1, 99)
    large, small = plain(tenths / 10), plain(tenths * factor / 10)
    if rng.random() < 0.5:
        unit, to, large, small = to, unit, small, large
    return conversion(rng, large, unit, to, f"{large} {unit} = {small} {to}", float(small))


def by_factor(rng: Random) -> Draft:
    """`17 hours = 17 * 60 minutes: 7*6=42, 1*6=6, 6+4=10, so 1020 minutes`; the zero of 60 is left out of the steps."""
    unit, to, factor, most = rng.choice(FACTORS)
    count = rng.randint(2, most)
    working = worked_product(count, factor // 10 if factor == 60 else factor) if factor in (7, 60) else worked_product(factor, count)
    return conversion(rng, str(count), unit, to, f"{count} {unit} = {count} * {factor} {to}{working}{count * factor} {to}", count * factor)


def conversion(rng: Random, quantity: str, unit: str, to: str, answer: str, value: float) -> Draft:
    prompt = said(rng, rng.choice(CONVERT).format(q=quantity, unit=unit, to=to))
    return Draft(f"{quantity} {unit} {to}", prompt, answer, {"value": value, "unit": to})


def plain(number: float) -> str:
    return f"{number:.4f}".rstrip("0").rstrip(".")


# Sorting

SORT_NUMBERS = ("Sort {items}", "Sort these numbers: {items}", "Order from small to large: {items}", "Put in order: {items}",
                "Sort the list {items}", "Arrange in ascending order: {items}", "Sort: {items}", "Sort {items} from small to large")  # fmt: skip
SORT_DOWN = ("Sort from large to small: {items}", "Sort in descending order: {items}", "Sort {items} from large to small",
             "Largest first: {items}", "Arrange in descending order: {items}")  # fmt: skip
SORT_WORDS = ("Sort {items}", "Sort these words: {items}", "Sort alphabetically: {items}", "Put in alphabetical order: {items}",
              "Sort the list {items}", "Sort the words {items}", "Sort: {items}", "Order these words: {items}")  # fmt: skip


def sort(rng: Random) -> Draft:
    count = rng.randint(3, 5)
    if rng.random() < 0.4:
        items = rng.sample(words.WORDS, min(count, 4))
        ordered, template = sorted(items), rng.choice(SORT_WORDS)
        key = ",".join(ordered)
    else:
        numbers = rng.sample([*range(100), *range(10)], count)
        down = rng.random() < 0.3
        items, ordered = [str(n) for n in numbers], [str(n) for n in sorted(numbers, reverse=down)]
        template = rng.choice(SORT_DOWN if down else SORT_NUMBERS)
        key = ",".join(str(n) for n in sorted(numbers))
    prompt = said(rng, template.format(items=", ".join(items)))
    return Draft(key, prompt, ", ".join(ordered), ordered)


# JSON from a sentence

EXTRACT = ("Extract {keys} as JSON: {text}", "Extract {keys} as JSON from: {text}", "Give me {keys} as JSON: {text}",
           "{text} Extract {keys} as JSON.", "JSON with {keys}: {text}", "Return JSON with {keys}. {text}",
           "Make JSON with the keys {keys}: {text}", "Read {keys} from this sentence as JSON: {text}")  # fmt: skip
SENTENCES: dict[str, tuple[str, ...]] = {
    "person": ("{name} is {age} years old and lives in {city}.", "{name} lives in {city} and is {age} years old.",
               "My friend {name} from {city} is {age}.", "In {city} lives {name}, who is {age} years old.",
               "{name}, {age}, lives in {city}.", "I met {name} ({age}) in {city}."),
    "order": ("{name} ordered {quantity} {colour} {item} for {price} euros.", "{name} bought {quantity} {colour} {item} and paid {price} euros.",
              "For {price} euros {name} bought {quantity} {colour} {item}.", "Send {quantity} {colour} {item} to {name}, the price is {price} euros.",
              "{name} wants {quantity} {colour} {item}. The price is {price} euros."),
    "meeting": ("{name} meets {guest} on {day} at {time} in {city}.", "On {day} at {time} {name} meets {guest} in {city}.",
                "The meeting of {name} and {guest} is on {day} at {time} in {city}.", "In {city}, {name} meets {guest} on {day} at {time}."),
    "flight": ("The flight from {from} to {to} leaves on {day} at {time}.", "On {day} at {time} we fly from {from} to {to}.",
               "We fly to {to} from {from} on {day} at {time}.", "Flight from {from} to {to}, {day}, {time}."),
    "lesson": ("{name} teaches {subject} on {day} in room {room}.", "The {subject} lesson of {name} is on {day} in room {room}.",
               "On {day} {name} teaches {subject} in room {room}.", "In room {room} {name} teaches {subject} on {day}."),
}  # fmt: skip


def extract_json(rng: Random) -> Draft:
    kind = rng.choice(list(SENTENCES))
    sentence = rng.choice(SENTENCES[kind])
    values = {field: a_value(rng, field) for field in re.findall(r"{(\w+)}", sentence)}
    keys = rng.sample(list(values), rng.randint(min(2, len(values)), min(4, len(values))))
    text = sentence.format(**values)
    listed = ", ".join(keys[:-1]) + " and " + keys[-1] if rng.random() < 0.6 else ", ".join(keys)
    found = {key: values[key] for key in keys}
    prompt = rng.choice(EXTRACT).format(keys=listed, text=text)
    return Draft(json.dumps(values, sort_keys=True), prompt, json.dumps(found), found)


def a_value(rng: Random, field: str) -> str | int:
    makers: dict[str, Callable[[], str | int]] = {
        "name": lambda: a_name(rng),
        "guest": lambda: a_name(rng),
        "city": lambda: a_city(rng),
        "from": lambda: a_city(rng),
        "to": lambda: a_city(rng),
        "age": lambda: rng.randint(2, 99),
        "quantity": lambda: rng.randint(2, 99),
        "price": lambda: rng.randint(2, 999),
        "room": lambda: rng.randint(1, 399),
        "colour": lambda: rng.choice(words.COLOURS),
        "item": lambda: rng.choice(words.THINGS),
        "day": lambda: rng.choice(words.DAYS),
        "time": lambda: f"{rng.randint(0, 23):02}:{rng.choice((0, 15, 30, 45)):02}",
        "subject": lambda: rng.choice(words.SUBJECTS),
    }
    return makers[field]()


# Tools

TEXT, INTEGER = "string", "integer"


@dataclass(frozen=True)
class Need:
    """What people ask a kind of tool for; tools of a kind differ in the names of their functions and parameters."""

    names: tuple[str, ...]
    description: str
    parameters: tuple[tuple[tuple[str, ...], str, str], ...]
    """(possible names, JSON type, field of `argument`)"""
    requests: tuple[str, ...]
    result: tuple[tuple[str, Callable[[Random], Any]], ...]


TOOLS = (
    Need(("get_weather", "weather", "current_weather"), "Weather in a city", ((("city", "location", "place"), TEXT, "city"),),
         ("What is the weather in {city}?", "How is the weather in {city}?", "Weather in {city}", "Is it raining in {city}?",
          "Will it be warm in {city}?", "Tell me the weather in {city}", "What's the weather like in {city}?"),
         (("temperature", lambda rng: rng.randint(1, 35)), ("sky", lambda rng: rng.choice(words.SKIES)))),
    Need(("get_time", "local_time", "clock"), "Time in a city", ((("city", "location", "place"), TEXT, "city"),),
         ("What time is it in {city}?", "Time in {city}", "Tell me the time in {city}", "How late is it in {city}?"),
         (("time", lambda rng: f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"),)),
    Need(("set_timer", "start_timer", "timer"), "Start a timer", ((("minutes", "duration"), INTEGER, "minutes"),),
         ("Set a timer for {minutes} minutes", "Start a timer of {minutes} minutes", "Timer {minutes} minutes",
          "Wake me in {minutes} minutes", "Tell me when {minutes} minutes are over"),
         (("status", lambda _: "started"),)),
    Need(("send_message", "message", "send_text"), "Send a message to a person",
         ((("to", "recipient", "name"), TEXT, "name"), (("text", "message", "body"), TEXT, "text")),
         ("Send a message to {name}: {text}", "Tell {name}: {text}", "Write to {name}: {text}", "Message {name}: {text}"),
         (("status", lambda rng: rng.choice(("sent", "delivered"))),)),
    Need(("book_flight", "find_flight", "search_flights"), "Find a flight",
         ((("from", "origin", "departure"), TEXT, "from"), (("to", "destination", "arrival"), TEXT, "to")),
         ("Book a flight from {from} to {to}", "Find a flight from {from} to {to}", "I want to fly from {from} to {to}",
          "Flights from {from} to {to}", "I need a flight to {to} from {from}"),
         (("price", lambda rng: rng.randint(30, 900)), ("flight", lambda rng: rng.choice("ABCDEFKLST") + str(rng.randint(10, 99))))),
    Need(("play_music", "play", "music_player"), "Play music of an artist", ((("artist", "name", "band"), TEXT, "name"),),
         ("Play music by {name}", "Play something by {name}", "I want to hear {name}", "Play songs by {name}"),
         (("status", lambda _: "playing"),)),
    Need(("add_event", "create_event", "calendar"), "Add an event to the calendar",
         ((("title", "event", "name"), TEXT, "title"), (("day", "date"), TEXT, "day")),
         ("Add {title} on {day} to my calendar", "Put {title} in my calendar on {day}", "I have {title} on {day}, add it to my calendar",
          "Create an event: {title} on {day}"),
         (("status", lambda rng: rng.choice(("added", "created"))),)),
    Need(("search", "web_search", "find"), "Search the web", ((("query", "q", "text"), TEXT, "query"),),
         ("Search for {query}", "Search the web for {query}", "Find pages about {query}", "Look up {query}", "Google {query}"),
         (("results", lambda rng: rng.randint(2, 999)),)),
    Need(("convert_currency", "exchange", "currency"), "Convert money",
         ((("amount", "value"), INTEGER, "amount"), (("from", "source"), TEXT, "money"), (("to", "target"), TEXT, "other_money")),
         ("Convert {amount} {money} to {other_money}", "How much is {amount} {money} in {other_money}?", "{amount} {money} in {other_money}",
          "Change {amount} {money} into {other_money}"),
         (("amount", lambda rng: rng.randint(2, 999)),)),
)  # fmt: skip
MONEY = ("EUR", "USD", "GBP", "JPY", "CHF", "NOK", "SEK")
TEXTS = ("I am late", "see you soon", "the train is late", "call me", "good luck", "dinner is ready", "I am at home", "happy birthday",
         "the meeting is over", "where are you", "thank you", "I am in the garden", "please buy bread", "please buy milk")  # fmt: skip


def make_tool(rng: Random, need: Need) -> Tool:
    """A tool of OpenAI's form that serves the need; the order of its parameters is the need's."""
    properties = {}
    for names, kind, _ in need.parameters:
        properties[rng.choice([name for name in names if name not in properties])] = {"type": kind}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": rng.choice(need.names), "description": need.description, "parameters": parameters}}


def some_tools(rng: Random, tool: Tool) -> list[Tool]:
    """The tool among up to two others of other kinds."""
    kind = tool["function"]["description"]
    others = rng.sample([need for need in TOOLS if need.description != kind], rng.choices((0, 1, 2), weights=(4, 4, 2))[0])
    tools = [tool, *(make_tool(rng, need) for need in others)]
    rng.shuffle(tools)
    return tools


def an_argument(rng: Random, field: str) -> str | int:
    makers: dict[str, Callable[[], str | int]] = {
        "name": lambda: a_name(rng),
        "city": lambda: a_city(rng),
        "from": lambda: a_city(rng),
        "to": lambda: a_city(rng),
        "minutes": lambda: rng.randint(1, 99),
        "amount": lambda: rng.randint(1, 999),
        "text": lambda: rng.choice(TEXTS),
        "title": lambda: rng.choice([*words.SUBJECTS, "dinner", "lunch", "a party", "a meeting", "the dentist", "a concert"]),
        "day": lambda: rng.choice(words.DAYS),
        "query": lambda: rng.choice([*words.TOPICS, *words.WORDS, *words.CITIES, a_name(rng)]),
        "money": lambda: rng.choice(MONEY),
        "other_money": lambda: rng.choice(MONEY),
    }
    return makers[field]()


@dataclass(frozen=True)
class Asked:
    """A request that a tool serves, and the call that serves it."""

    need: Need
    tools: list[Tool]
    prompt: str
    call: dict[str, Any]


def ask_for_tool(rng: Random) -> Asked:
    need = rng.choice(TOOLS)
    tool = make_tool(rng, need)
    values = {field: an_argument(rng, field) for _, _, field in need.parameters}
    prompt = said(rng, rng.choice(need.requests).format(**values))
    names = tool["function"]["parameters"]["properties"]
    call = {"name": tool["function"]["name"], "arguments": dict(zip(names, values.values(), strict=True))}
    return Asked(need, some_tools(rng, tool), prompt, call)


def tool_call(rng: Random) -> Draft:
    asked = ask_for_tool(rng)
    return Draft(json.dumps(asked.call), asked.prompt, tool_call_text(**asked.call), asked.call, tools=asked.tools)


def tool_result(rng: Random) -> Draft:
    """The turn after a tool call: its result, told in words."""
    asked = ask_for_tool(rng)
    result = {field: make(rng) for field, make in asked.need.result}
    function = {"name": asked.call["name"], "arguments": json.dumps(asked.call["arguments"])}
    before = (
        {"role": "assistant", "content": None, "tool_calls": [{"id": "call_0", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "call_0", "content": json.dumps(result)},
    )
    told = ", ".join(f"{field} {value}" for field, value in result.items())
    key = json.dumps([asked.call, result])
    return Draft(key, asked.prompt, f"The result is: {told}.", [str(value) for value in result.values()], asked.tools, before)


# Talk

TALK = (
    (words.GREETINGS, HELLO),
    (words.WHO, I_AM),
    (words.ABILITIES, I_CAN),
    (words.THANKS, "You are welcome!"),
    (words.GOODBYES, "Goodbye!"),
    (words.FEELINGS, "I am well, thank you. What can I work out for you?"),
)
ENDS = ("", "!", ".", "?", "...", " :)", ", Fairlead", ", my friend", " please", ", model", "!!", " now", " today", ", assistant")


def talk(rng: Random) -> Draft:
    phrases, answer = rng.choice(TALK)
    phrase = rng.choice(phrases)
    prompt = rng.choice((phrase, phrase.lower(), phrase[0].lower() + phrase[1:])) + rng.choice(ENDS)
    return Draft(prompt.lower(), prompt, answer, answer)


def decline(rng: Random) -> Draft:
    if rng.random() < 0.2:
        prompt, answer = too_large(rng), TOO_LARGE
    elif rng.random() < 0.1:
        prompt, answer = " ".join(made_up(rng).lower() for _ in range(rng.randint(1, 4))), DO_NOT_KNOW
    else:
        prompt, answer = said(rng, fill(rng, rng.choice(words.QUESTIONS)), "?"), DO_NOT_KNOW
    return Draft(prompt.lower(), prompt, answer, answer)


def too_large(rng: Random) -> str:
    small, large = rng.randrange(1000), rng.randrange(1000, 10 ** rng.randint(4, 6))
    if rng.random() < 0.3:
        return said(rng, rng.choice(MULTIPLY).format(a=rng.randint(11, 999), b=rng.randint(11, 999)))
    a, b = (small, large) if rng.random() < 0.5 else (large, small)
    return said(rng, rng.choice(ADD + SUBTRACT).format(a=a, b=b))


TASKS: dict[str, Callable[[Random], Draft]] = {
    "add": add,
    "subtract": subtract,
    "multiply": multiply,
    "units": units,
    "sort": sort,
    "json": extract_json,
    "tool_call": tool_call,
    "tool_result": tool_result,
    "talk": talk,
    "decline": decline,
}
SHARES = {
    "add": 7,
    "subtract": 10,
    "multiply": 10,
    "units": 8,
    "sort": 18,
    "json": 22,
    "tool_call": 16,
    "tool_result": 3,
    "talk": 2,
    "decline": 4,
}
"""How often a task is trained on: more for what takes longest to learn."""


def write_held_out(path: Path = FOLDER / "held_out.jsonl", num_examples: int = 40) -> None:
    """The fixed examples that ship beside the weights: `num_examples` different questions of each task."""
    lines = []
    for task in TASKS:
        found: dict[str, str] = {}
        for example in examples(task, "test", seed=0):
            found.setdefault(example.messages[0]["content"], json.dumps(asdict(example), ensure_ascii=False))
            if len(found) == num_examples:
                break
        lines += found.values()
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_held_out()
