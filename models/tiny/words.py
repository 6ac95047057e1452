"""The words that the examples of the small language model are made of."""

# ruff: noqa: SIM905 - a paragraph of words reads better than a list of quotes

NAMES = """Ada Adam Aisha Alan Alice Amir Ana Anders Anna Anton Arthur Astrid Ben Bianca Boris Bruno Carla Carlos Chen Clara
Daniel David Diana Dora Edgar Elena Elias Emil Emma Erik Eva Felix Finn Frida Georg Grace Greta Hana Hans Helen Henrik Hugo Ida Igor
Ines Ingrid Iris Ivan Jack Jana Jonas Julia Kai Karin Karl Kofi Lara Laura Leo Lena Lina Lucas Luis Magnus Mara Maria Marta Martin Max
Maya Mei Mia Mila Mira Nadia Nils Nina Noah Nora Olaf Olga Omar Oscar Otto Paul Pedro Peter Petra Priya Rosa Ruth Samir Sara Sofia
Stefan Sven Tara Theo Tom Vera Victor Yara Yuki Zoe John Mary Bob James Linda Sam Lisa Mark Kate""".split()

CITIES = """Amsterdam Athens Austin Bergen Berlin Bern Boston Brussels Cairo Chicago Cologne Copenhagen Delhi Denver Dublin Florence
Geneva Hamburg Hanoi Helsinki Istanbul Kyoto Lagos Leipzig Lima Lisbon London Lyon Madrid Malmo Manila Melbourne Miami Milan Montreal
Mumbai Munich Nairobi Naples Oslo Ottawa Paris Porto Prague Quito Riga Rome Seattle Seoul Seville Sofia Stockholm Sydney Tallinn Tokyo
Toronto Turin Utrecht Venice Vienna Vilnius Warsaw York Zagreb Zurich Dallas Houston Beijing Shanghai Singapore Dubai""".split()

COUNTRIES = """France Germany Japan Brazil Norway Kenya Canada Peru Italy Spain Poland India China Egypt Mexico Chile Ghana Iceland
Ireland Finland Sweden Vietnam Turkey Austria Greece Portugal Australia""".split()

THINGS = """lamps chairs books pens cups plates tables shirts shoes hats bags boxes tickets mugs candles towels blankets pillows
bottles spoons forks knives clocks phones cables screens keyboards batteries stamps brushes""".split()

WORDS = """apple banana cherry date fig grape kiwi lemon mango orange peach plum ant bear cat dog eagle fox goat horse lion mouse
otter panda rabbit snake tiger wolf zebra chair desk lamp table window door book pen paper cup red blue green yellow black white
river lake hill forest island cloud rain moon star bread milk cheese sugar honey tea juice car bus train""".split()

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

COLOURS = "red blue green yellow black white brown pink purple grey".split()

SKIES = "sunny cloudy rainy windy foggy snowy clear stormy".split()

SUBJECTS = """maths art music physics history biology chemistry geography cooking swimming chess dance football tennis
painting knitting yoga karate""".split()

LANGUAGES = "French German Spanish Italian Norwegian Polish Dutch Greek Turkish Japanese Chinese Arabic English Swedish".split()

TOPICS = """love|war|football|the moon|the weather|quantum physics|dogs|my cat|the sea|a dragon|the stock market|politics|history|chess
|the sun|a robot|climate change|music|the universe|spring|the king|a castle|Mars|ghosts|bread|poetry|the brain|dinosaurs|trees
|the internet|computers|cars|fish|the desert|the news|philosophy|a pirate|the mountains|wine|coffee|economics|space travel|time|life
|a princess|money|tennis|gold|Python|the president|art|gravity|black holes|birds|winter|the Romans|volcanoes""".replace("\n", "").split("|")

QUESTIONS = """Write a poem about {topic}|Tell me a story about {topic}|What is the capital of {country}|Who is the president of {country}
|Explain {topic}|What do you think about {topic}|Write an essay about {topic}|Do you like {topic}|Tell me about {topic}|Tell me a joke
|Tell me a joke about {topic}|How many people live in {city}|How far is it from {city} to {city}|What is the meaning of {topic}
|Translate hello into {language}|How do you say {word} in {language}|Who wrote a book about {topic}|When did {name} live|Who is {name}
|What is the best restaurant in {city}|Write code for {topic}|Write a Python function|Write a letter to {name}|Where is {city}
|Why is the sky blue|What is {topic}|What is a {word}|How do I cook {word}|Give me a recipe for {word}|Recommend a film about {topic}
|Who won the game in {country}|Is {city} bigger than {city}|Sing a song about {topic}|What is the history of {country}
|How does {topic} work|Why is {topic} important|Summarize the book about {topic}|Draw a {word}|Can you help me with {topic}
|What should I eat today|What is the weather in {city}|What time is it in {city}|What time is it|Send a message to {name}
|Set a timer|Play some music|Book a flight to {city}|What happened in {country}|How old is {name}|When was {topic} invented
|Which language do they speak in {country}|Is it true that {topic} is a {word}|Can you see {topic}|Which {word} is the best
|What is the name of my {word}|I am sad about {topic}|I like {topic}|My {word} is broken|Should I buy a {word}|Compare {topic} and {topic}
|Who invented {topic}|How can I learn {language}|Describe {city}|Describe {topic}|Give me some advice about {topic}
|Do you know {name}|Where does {name} live|Find a hotel in {city}|What is the population of {country}""".replace("\n", "").split("|")

GREETINGS = "Hello|Hi|Hey|Good morning|Good evening|Good day|Hello there|Hi there|Hey there|Greetings|Good afternoon|Howdy".split("|")
WHO = """Who are you|What are you|What is your name|Tell me who you are|Which model are you|What model is this|Who am I talking to
|Introduce yourself|Are you a robot|Are you human|Who made you|What is this|Are you an AI|Are you ChatGPT|Tell me about yourself
|Who is this|What kind of model are you""".replace("\n", "").split("|")
ABILITIES = """What can you do|What do you know|How can you help me|What can I ask you|Help|What are you good at|Can you help me
|What tasks can you do|What can I ask|Which tasks do you know|What are your skills|Tell me what you can do|How can you help
|What can you help me with|Show me what you can do""".replace("\n", "").split("|")
THANKS = """Thanks|Thank you|Thank you very much|Thanks a lot|Many thanks|Great, thanks|Thank you so much|Nice, thank you|Cheers
|Perfect, thanks|That helps, thank you|Good job|Well done|Great|Very good""".replace("\n", "").split("|")
GOODBYES = """Bye|Goodbye|See you|See you later|Bye bye|Good night|I have to go|Farewell|See you tomorrow|Take care|Until next time
|That is all|Talk to you later|Ciao""".replace("\n", "").split("|")
FEELINGS = """How are you|How are you doing|How do you do|How is it going|How do you feel|Are you well|Are you ok|How are things
|How are you today|How is your day""".replace("\n", "").split("|")

SYSTEMS = """You are a helpful assistant.|You are a small model.|Be brief.|Answer in one line.|You are Fairlead.|You help with small tasks.
|Answer the question.|You are an assistant in a shop.|Be polite and short.|You are a calculator.|Think before you answer.
|You are a helpful assistant that calls tools.|Today is {day}.|The user is {name}.|The user lives in {city}.""".replace("\n", "").split("|")
