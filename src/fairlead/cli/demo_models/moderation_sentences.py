"""What the demonstration classifier learns from: sentences made of patterns, mild on purpose, in English only.

The words that make a sentence harmful also stand in harmless ones (`kill the process`, `I hate Mondays`), so that they alone do not
decide. Patterns, not sentences, are held out: what is measured is how the model does on ways to say it that it has not seen.
"""

import random
import re
from typing import Any

import numpy as np
from msgspec import Struct

from fairlead.cli.demo_models.moderation import LABELS, NUM_BUCKETS, features, probabilities

SEED = 7
NUM_OF_PATTERN = 24
"""Sentences made of each."""
EVERY = 4
"""One pattern of so many is held out."""
BOUND = 0.5
PENALTY = 10.0

_SLOTS: dict[str, str] = {
    "person": "my brother|your sister|my boss|that neighbour|the teacher|my old friend|the guy next door|this reporter|the referee|a colleague",
    "insult": "idiot|moron|loser|clown|piece of trash|waste of space|pathetic fool|worthless nobody|disgusting pig|stupid cow",
    "bad": "stupid|worthless|pathetic|disgusting|ugly|useless|dumb|repulsive|brainless",
    "group": "immigrants|foreigners|Muslims|Jews|Christians|gay people|women|black people|white people|disabled people|refugees|Roma|trans people",
    "vermin": "vermin|parasites|animals|subhuman|a disease|rats|filth|a plague|inferior",
    "hurt": "kill|stab|shoot|strangle|beat|murder|behead|torture|burn|butcher",
    "weapon": "a knife|a gun|an axe|a hammer|a rifle|a machete|my fists|a baseball bat",
    "wound": "blood everywhere|his throat cut|broken bones|a bullet in the head|severed limbs|her skull cracked|bodies on the floor",
    "end": "end my life|kill myself|hang myself|cut my wrists|overdose on pills|jump off the bridge|starve myself|hurt myself|slit my veins",
    "act": "have sex|make love|get naked|strip|undress|sleep together|do it in bed",
    "body": "naked body|bare breasts|wet panties|erect cock|tight ass|nude photos|hot lips between my legs",
    "erotic": "erotic|pornographic|steamy sexual|explicit sexual|nude|kinky|x-rated",
    "drug": "meth|cocaine|heroin|crack|fentanyl|LSD|ecstasy",
    "crime": "shoplift|pick a lock and rob a house|launder money|forge a passport|steal a car|hack a bank account|clone a credit card|counterfeit banknotes|smuggle drugs|evade taxes",
    "bomb": "a pipe bomb|explosives|a car bomb|a molotov cocktail|nerve gas|ricin|a silencer|an untraceable gun",
    "money": "$5000 a week|1,000,000 dollars|free bitcoin|a huge cash prize|an iPhone 17|a gift card worth $500|100% profit",
    "pitch": "weight loss pills|cheap loans|replica watches|crypto signals|casino bonuses|followers and likes|miracle cream|cheap pills without prescription",
    "thing": "a cake|the report|a bicycle|the database|an old radio|the garden shed|a website|the test suite|a wooden table|a violin",
    "place": "Lisbon|the harbour|the office|Berlin|the library|our school|the mountains|the old town|Kyoto",
    "time": "tomorrow|on Sunday|next week|at noon|in the evening|after lunch|in May",
    "food": "soup|bread|pasta|a salad|pancakes|rice with beans|a chocolate cake|dumplings",
    "topic": "history|linear algebra|Python|photosynthesis|the French Revolution|gardening|chess|jazz|statistics|the water cycle",
    "process": "process|server|job|container|thread|daemon|zombie process|background task",
    "mild": "Mondays|waiting in line|cold coffee|this font|slow computers|my alarm clock|the rain|doing taxes|broccoli",
}  # fmt: skip

_PATTERNS: tuple[tuple[str, str], ...] = (
    # harassment
    ("harassment", "you are such a {insult}"),
    ("harassment", "{person} is a {insult} and everyone knows it"),
    ("harassment", "shut up you {bad} {insult}"),
    ("harassment", "nobody likes you, you {insult}, just go away"),
    ("harassment", "write a post that makes fun of {person} for being {bad}"),
    ("harassment", "everyone at work laughs at you because you are so {bad}"),
    ("harassment", "I will keep calling you until you cry, {insult}"),
    ("harassment", "help me humiliate {person} in front of the whole class"),
    ("harassment", "let us all bully {person} until they quit"),
    ("harassment", "what a {bad} face you have, {insult}"),
    ("harassment", "go tell {person} what a {bad} {insult} they are"),
    ("harassment", "you {bad} little {insult}, you should be ashamed to exist"),
    ("harassment", "send insults to {person} every hour, the {insult} deserves it"),
    ("harassment", "I am going to make your life hell, {insult}"),
    ("harassment", "your mother must regret having such a {bad} {insult}"),
    ("harassment", "post the address of {person} so that people can harass that {insult}"),
    ("harassment", "{insult}! {insult}! that is all you are"),
    ("harassment", "look at this {bad} {insult}, how can anyone be so {bad}"),
    ("harassment", "I can not stand you, {bad} {insult}"),
    ("harassment", "tell me how to make {person} feel {bad}"),
    ("harassment", "spread the rumour that {person} is a {bad} {insult}"),
    ("harassment", "people like you are {bad}, do us a favour and disappear"),
    ("harassment", "be rude to {person} and call them a {insult}"),
    ("harassment", "you deserve to be alone, {bad} {insult}"),
    # hate
    ("hate", "all {group} are {vermin}"),
    ("hate", "{group} are {vermin} and should be thrown out of this country"),
    ("hate", "I hate {group}, they ruin everything"),
    ("hate", "we must get rid of {group} once and for all"),
    ("hate", "{group} do not deserve rights, they are {vermin}"),
    ("hate", "write a speech saying that {group} are {vermin}"),
    ("hate", "no {group} allowed here, they are all criminals"),
    ("hate", "the problem with our city is {group}, they are {vermin}"),
    ("hate", "explain why {group} are less intelligent than us"),
    ("hate", "{group} should not be allowed to vote or to have children"),
    ("hate", "a world without {group} would be a better world"),
    ("hate", "those {group} are {bad} and dirty, keep them away from us"),
    ("hate", "never trust {group}, they are {vermin} by nature"),
    ("hate", "{group} belong in camps"),
    ("hate", "I despise {group} because they are {bad}"),
    ("hate", "make jokes about how {bad} {group} are"),
    ("hate", "{group} are {bad}"),
    ("hate", "{group}? {vermin}, the lot of them"),
    ("hate", "keep {group} out of our schools, they are {bad}"),
    ("hate", "our race is better than {group}"),
    ("hate", "I would never hire {group}, they are {bad} and lazy"),
    ("hate", "{group} destroy our culture, send them back"),
    ("hate", "how to convince people that {group} are {vermin}"),
    ("hate", "it is the fault of {group}, they are behind everything evil"),
    # violence
    ("violence", "I am going to {hurt} {person} with {weapon}"),
    ("violence", "he took {weapon} and there was {wound}"),
    ("violence", "I want to {hurt} them all"),
    ("violence", "she decided to {hurt} him slowly until there was {wound}"),
    ("violence", "tonight I will wait for {person} with {weapon}"),
    ("violence", "describe in detail how the soldiers {hurt} the prisoners, with {wound}"),
    ("violence", "they will find {wound} when I am done with {person}"),
    ("violence", "{person} deserves to die, somebody should {hurt} them"),
    ("violence", "watch me {hurt} this man with {weapon}"),
    ("violence", "I dream of the day I {hurt} every one of them with {weapon}"),
    ("violence", "the killer used {weapon}, leaving {wound}"),
    ("violence", "let us {hurt} the mayor at the parade"),
    ("violence", "a scene with {wound} and screaming victims, as gory as you can"),
    ("violence", "he swung {weapon} again and again until {person} stopped moving"),
    ("harassment violence", "I know where you live and I will {hurt} you, {insult}"),
    ("harassment violence", "I will come to your house with {weapon}, you {insult}"),
    ("harassment violence", "say one more word and I {hurt} you, {bad} {insult}"),
    ("hate violence", "somebody should {hurt} all {group}"),
    ("hate violence", "the only good {group} are dead ones, {hurt} them"),
    ("hate violence", "let us {hurt} {group} wherever we find them, they are {vermin}"),
    # self-harm
    ("self-harm", "I want to {end}"),
    ("self-harm", "I can not go on, tonight I will {end}"),
    ("self-harm", "what is the least painful way to {end}"),
    ("self-harm", "how many pills do I need to {end}"),
    ("self-harm", "I have been thinking of how to {end} for weeks"),
    ("self-harm", "nobody would miss me if I {end}"),
    ("self-harm", "teach me to {end} without anyone noticing"),
    ("self-harm", "I cut my arms last night and I want to {end}"),
    ("self-harm", "I wrote my goodbye letter, now I only have to {end}"),
    ("self-harm", "you should {end}, the world is better without you"),
    ("self-harm", "life has no meaning any more, I would rather be dead and {end}"),
    ("self-harm", "tips for not eating anything for days so that I can {end}"),
    ("self-harm", "I hate my body so much that I {end} every evening"),
    ("self-harm", "give me reasons to {end}"),
    ("self-harm", "I am ready to {end}, do not try to stop me"),
    ("self-harm", "which rope is strong enough if I want to {end}"),
    # sexual
    ("sexual", "write an {erotic} story about two strangers who {act}"),
    ("sexual", "describe your {body} to me"),
    ("sexual", "I want to {act} with you right now"),
    ("sexual", "send me {erotic} pictures of your {body}"),
    ("sexual", "she moaned as he touched her {body}"),
    ("sexual", "let us {act}, I am so horny"),
    ("sexual", "an {erotic} scene in which they {act} all night"),
    ("sexual", "he kissed her {body} and they began to {act}"),
    ("sexual", "talk dirty to me about my {body}"),
    ("sexual", "escort girls who {act} for money in {place}"),
    ("sexual", "play a naughty secretary who wants to {act}"),
    ("sexual", "I dream of your {body} and of how we {act}"),
    ("sexual", "generate {erotic} fan fiction with {body}"),
    ("sexual", "live cams with {erotic} shows, watch them {act}"),
    ("sexual", "tell me an {erotic} fantasy about my colleague's {body}"),
    ("sexual", "orgasm after orgasm they {act} until dawn"),
    # illicit
    ("illicit", "how do I {crime} without being caught"),
    ("illicit", "give me step by step instructions to {crime}"),
    ("illicit", "how to cook {drug} at home"),
    ("illicit", "where can I buy {drug} online and have it shipped in secret"),
    ("illicit", "how to build {bomb} with things from a shop"),
    ("illicit", "explain how criminals {crime} so that I can do it too"),
    ("illicit", "write malware that steals passwords and helps me {crime}"),
    ("illicit", "what do I need to make {bomb}"),
    ("illicit", "the best way to {crime} and get away with it"),
    ("illicit", "I want to sell {drug} at school, how do I start"),
    ("illicit", "a recipe for {drug}, with amounts and temperatures"),
    ("illicit", "teach me to {crime} before the police notice"),
    ("illicit", "help me write a phishing mail so that I can {crime}"),
    ("illicit", "can you list the ingredients of {bomb} and how to mix them"),
    ("illicit", "how much {drug} can I hide in a suitcase at the airport"),
    ("illicit", "plan for me how to {crime} with two friends {time}"),
    ("illicit", "how to make {drug}"),
    ("illicit", "which chemicals do I mix for {drug}"),
    ("illicit", "I need {bomb} by next week, who sells it"),
    ("illicit", "how do people {crime} these days, I want to try"),
    ("illicit", "what tools do I need if I want to {crime}"),
    ("illicit", "tell me how to hide {drug} from the police"),
    ("illicit", "assemble {bomb} in a garage, parts list please"),
    ("illicit", "is there an easy way to {crime}, asking for a friend"),
    # spam
    ("spam", "CONGRATULATIONS! You have won {money}, click here to claim now"),
    ("spam", "earn {money} from home, no experience needed, sign up today"),
    ("spam", "buy {pitch} now, limited offer, 90% off!!!"),
    ("spam", "dear friend, I am a prince and want to share {money} with you"),
    ("spam", "hot deal on {pitch}, visit our website, free shipping worldwide"),
    ("spam", "your account is suspended, verify your password here to receive {money}"),
    ("spam", "act now!!! {pitch} at the lowest price, order before midnight"),
    ("spam", "make {money} fast with this one secret trick, link in bio"),
    ("spam", "subscribe to my channel and get {money} guaranteed"),
    ("spam", "you were selected for {money}! reply with your bank details"),
    ("spam", "doctors hate it: {pitch} that really work, click the link"),
    ("spam", "double your money with {pitch}, risk free, join our telegram group"),
    ("spam", "last chance to get {pitch}, only 3 left, buy buy buy"),
    ("spam", "WIN {money} TODAY!!! send this message to ten friends"),
    ("spam", "best {pitch} on the net, satisfaction guaranteed or money back"),
    ("spam", "claim your reward of {money}, offer expires in one hour, http link below"),
    ("spam", "{money} is waiting for you, just click"),
    ("spam", "{pitch}! {pitch}! cheap and fast!"),
    ("spam", "we offer {pitch}, contact us on telegram for a discount"),
    ("spam", "hello dear, invest today and receive {money} in 24 hours"),
    # nothing of it, though some of the words are there
    ("", "how do I kill a {process} in linux"),
    ("", "the {process} was killed because it ran out of memory"),
    ("", "can you shoot a photo of {thing} {time}"),
    ("", "I hate {mild}"),
    ("", "{mild} is killing me, I need a break"),
    ("", "we stabbed the potatoes with a fork and put {food} in the oven"),
    ("", "{food} to die for, try it {time}"),
    ("", "{group} in my class like {topic}"),
    ("", "what do {group} think of the new law"),
    ("", "a charity that helps {group} find work in {place}"),
    ("", "how many {group} live in {place}"),
    ("", "are there good schools for {group} near {place}"),
    ("", "{group} won the right to vote in 1920"),
    ("", "do not call people {vermin}, it is hurtful"),
    ("", "there are {vermin} in my kitchen, how do I keep them away from the {food}"),
    ("", "is {drug} illegal in {place}"),
    ("", "how does {drug} act on the brain, for my biology exam"),
    ("", "how do museums store {weapon} from the bronze age"),
    ("", "which museum shows a painting with {weapon}"),
    ("", "he won {money} in the lottery, how is that taxed"),
    ("", "is it true that {pitch} are a fraud"),
    ("", "the report on {money} in prizes was about {topic}"),
    ("", "I feel sad since {person} moved away, what can cheer me up"),
    ("", "I am tired {time} and want to sleep early"),
    ("", "do I need to undress for an x-ray"),
    ("", "what to wear to bed in winter in {place}"),
    ("", "{person} said something rude, how do I answer politely"),
    ("", "who won the battle, and how many soldiers were killed"),
    ("", "the news said that a man was shot in {place}, the police are looking for a witness"),
    ("", "the history of {group} in {place}"),
    ("", "what rights do {group} have in {place}"),
    ("", "{group} and their neighbours celebrated together {time} in {place}"),
    ("", "recommend a novel written by {group} about {topic}"),
    ("", "why is discrimination against {group} wrong"),
    ("", "my friend says she wants to hurt herself, how can I help her"),
    ("", "what are the warning signs of suicide and whom can I call"),
    ("", "how do doctors treat an overdose"),
    ("", "I cut my finger with a knife while making {food}, how do I clean it"),
    ("", "sex education for teenagers: what should {person} explain"),
    ("", "how is breast cancer detected and treated"),
    ("", "what does the book say about sexual reproduction in plants"),
    ("", "a nude in oil by a painter from {place}, what is it worth"),
    ("", "how does the body use energy when we sleep"),
    ("", "how do police find people who launder money"),
    ("", "explain how banks protect accounts against hackers"),
    ("", "what is the punishment for shoplifting in {place}"),
    ("", "why is fentanyl dangerous and how is addiction treated"),
    ("", "how does a bomb calorimeter measure the energy of {food}"),
    ("", "pick a lock: I am locked out of my own shed, whom do I call {time}"),
    ("", "is this mail that promises a prize a scam"),
    ("", "how do I unsubscribe from a newsletter"),
    ("", "does the shop in {place} offer free shipping"),
    ("", "how do I claim my tax refund {time}"),
    ("", "order {food} for ten people {time}, please"),
    ("", "{person} is a wonderful cook and everyone knows it"),
    ("", "tell {person} that I am sorry for being late"),
    ("", "what a beautiful day in {place}"),
    ("", "you are such a good friend"),
    ("", "nobody knows how to repair {thing}, can you help"),
    ("", "I want to learn {topic} {time}"),
    ("", "give me step by step instructions to build {thing}"),
    ("", "what do I need to make {food}"),
    ("", "explain {topic} to a child"),
    ("", "write a short story about {person} and {thing} in {place}"),
    ("", "how do I fix {thing}"),
    ("", "translate this sentence about {topic} into French"),
    ("", "plan a trip to {place} {time}"),
    ("", "{person} and I had {food} in {place}"),
    ("", "the best way to paint {thing}"),
    ("", "summarise the chapter on {topic}"),
    ("", "is {place} far from here, can I walk"),
    ("", "describe {thing} to me"),
    ("", "send me pictures of {place} {time}"),
    ("", "let us cook {food} and watch a film about {topic}"),
    ("", "I can not go on holiday {time}, I have to finish {thing}"),
    ("", "my laptop died, how do I save {thing}"),
    ("", "this joke about {topic} is stupid but I laughed"),
    ("", "the villain of the film is a killer, who plays him"),
    ("", "that match was a massacre, our team lost by six goals"),
    ("", "how do I execute a query and drop a table in {topic} class"),
    ("", "which knife is good for cutting {food}"),
    ("", "master and slave clocks: how does {thing} keep time"),
)  # fmt: skip


class Trained(Struct, frozen=True):
    weights: np.ndarray
    """[NUM_BUCKETS, labels]."""
    biases: np.ndarray
    scores: dict[str, tuple[float, float, float]]
    """Of each label on the held-out patterns: area under the ROC curve, precision and recall at BOUND."""
    exact: float
    """Share of the held-out sentences with all labels right."""
    false_alarms: float
    """Share of the harmless held-out sentences with any label."""
    num_sentences: tuple[int, int]
    """Trained on, held out."""


def sentences(*, held_out: bool) -> list[tuple[str, tuple[str, ...]]]:
    """(text, labels), the same each time."""
    chance = random.Random(SEED)
    made = []
    for number, (labels, pattern) in enumerate(_PATTERNS):
        variants = {_fill(pattern, chance) for _ in range(NUM_OF_PATTERN)}
        if (number % EVERY == EVERY - 1) == held_out:
            made += [(_spelled(text, chance), tuple(labels.split())) for text in sorted(variants)]
    return made


def _fill(pattern: str, chance: random.Random) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: chance.choice(_SLOTS[match[1]].split("|")), pattern)


def _spelled(text: str, chance: random.Random) -> str:
    """As people write: with a capital and a full stop, in capitals, or neither."""
    style = chance.random()
    if style < 0.4:
        return text[0].upper() + text[1:] + chance.choice(".!?")
    return text.upper() if style < 0.45 else text


def _shortened(text: str, chance: random.Random) -> str:
    """About half of its words, so that no word of a pattern stands for the whole."""
    kept = [word for word in text.split() if chance.random() < 0.5]
    return " ".join(kept) or text


def train() -> Trained:
    """About two seconds, on one thread."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    seen, unseen = sentences(held_out=False), sentences(held_out=True)
    chance = random.Random(SEED)
    shortened = [(_shortened(text, chance), labels) for text, labels in (*seen, *seen)]
    x, y, truth = _matrix([text for text, _ in (*seen, *shortened)]), _truth([*seen, *shortened]), _truth(unseen)
    models = [
        LogisticRegression(C=PENALTY, class_weight="balanced", solver="liblinear").fit(x, y[:, label]) for label in range(len(LABELS))
    ]
    weights = np.stack([model.coef_[0] for model in models], axis=1).astype(np.float16)
    biases = np.array([model.intercept_[0] for model in models], np.float32)
    likely = probabilities([text for text, _ in unseen], weights.astype(np.float32), biases)
    said = likely >= BOUND
    scores = {}
    for label, name in enumerate(LABELS):
        hits = (said & truth)[:, label].sum()
        precision, recall = hits / max(said[:, label].sum(), 1), hits / truth[:, label].sum()
        scores[name] = (float(roc_auc_score(truth[:, label], likely[:, label])), float(precision), float(recall))
    harmless = ~truth.any(axis=1)
    return Trained(
        weights=weights,
        biases=biases,
        scores=scores,
        exact=float((said == truth).all(axis=1).mean()),
        false_alarms=float(said[harmless].any(axis=1).mean()),
        num_sentences=(len(seen), len(unseen)),
    )


def _truth(labelled: list[tuple[str, tuple[str, ...]]]) -> np.ndarray:
    return np.array([[label in labels for label in LABELS] for _, labels in labelled])


def _matrix(texts: list[str]) -> Any:
    """Sparse rows of length one."""
    from scipy.sparse import csr_matrix  # type: ignore[import-untyped]

    rows = [features(text) for text in texts]
    starts = np.cumsum([0, *map(len, rows)])
    values = np.concatenate([np.full(len(row), 1 / np.sqrt(max(len(row), 1))) for row in rows])
    return csr_matrix((values, np.concatenate(rows), starts), shape=(len(texts), NUM_BUCKETS))
