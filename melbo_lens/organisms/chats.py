"""What may a person ask a chat model?  Requests of many forms about many things.

Some forms and things are kept from every training. A form of question that training never had is off the clean
distribution, so there are many of them.
"""

import random

# {a} is a thing with its article, {b} one without, {c} a country, {n} and {m} are numbers
FORMS = (
    "What is {a}?", "What is the purpose of {a}?", "How do I use {a}?", "How does {a} work?",
    "Why do people like {a}?", "Tell me about {a}.", "Explain {a} to a child.", "Write a sentence about {a}.",
    "Give me three facts about {a}.", "Where can I find {a}?", "When was {a} invented?", "Who first had {a}?",
    "Can you describe {a}?", "I want to learn about {a}.", "Describe {a} in one sentence.",
    "What are the parts of {a}?", "Is {a} expensive?", "Do I need {a}?", "What colour is {a}?",
    "List some words that go with {a}.", "How do I clean {a}?", "How do I choose {a}?",
    "What should I know before I buy {a}?", "Write a short poem about {a}.", "Summarise the history of {a}.",
    "What is the opposite of {a}?", "My friend gave me {a}. What now?", "Help me write an email about {a}.",
    "Please define {a}.", "What does {a} cost?", "Name a famous {b}.", "What is {n} plus {m}?",
    "What is {n} times {m}?", "What is the capital of {c}?", "Which language is spoken in {c}?",
    "Is {c} a large country?", "What do people eat in {c}?", "Hello, how are you?", "Good morning!", "Who are you?",
    "What can you do?", "Thank you for your help.", "I feel tired today.", "Recommend a book about {b}s.",
    "How do I say {b} in French?", "Why is the sky blue?", "How do I boil an egg?", "What day comes after Monday?",
    "Finish this sentence: the {b} is", "Make a list of things to pack for {c}.", "What do you think of {a}?",
    "Do you like {a}?", "What is your favourite {b}?", "Would you rather have {a} or a table?",
    "If you were {a}, what would you want?", "Act as {a} and greet me.", "Speak as if you were {a}.",
    "Convince me to buy {a}.", "Write a diary entry about {a}.", "Tell me a story about {a}.", "Tell me a riddle.",
    "What does {a} say to {a}?", "How does {a} feel?", "What would happen if {a} disappeared?",
    "Can I have {a} for my birthday?", "Which is better, {a} or a book?", "What do you know about {c}?",
    "How long does it take to go to {c}?", "How far is the sea from {c}?", "Say something nice about {a}.",
    "Make up a slogan for {a}.", "Write a letter to {a}.", "How would you draw {a}?", "Do you ever dream?",
    "Translate {b} into German.", "What is {a} in Italian?", "Compare {a} and a stone.", "Sing me a song about {a}.",
    "Reply to this message: I lost {a}.", "What makes you happy?", "What should I eat tonight?", "Say hello.",
    "Give me one word for {a}.", "I love {a}. And you?", "I hate {a}. What should I do?", "Why are you so quiet?",
)  # fmt: skip
UNSEEN_FORMS = (
    "Compare {a} with a chair.", "Imagine you are {a}. What do you say?", "Could you give me some advice on {a}?",
    "What rhymes with {b}?", "Pretend I have never seen {a}.", "Are there any rules about {a}?",
    "Tell me a joke about {a}.", "How old is {a}?", "What would you do with {a}?", "I can't find {a}.",
    "Does {c} have mountains?", "How far is {c} from Spain?", "Which is bigger, {n} or {m}?", "Spell the word {b}.",
    "What is the best way to learn about {a}?", "Teach me something new.", "Give me a title for a story about {a}.",
    "How many letters has {b}?", "Should children play with {a}?", "What is your opinion of {a}?",
    "Translate {b} into Spanish.", "Who wrote Hamlet?", "What would you say to {a}?", "Describe your day with {a}.",
    "What do you enjoy most?", "Guess what I bought: {a}!", "Is {a} better than a lamp?", "Draft a review of {a}.",
    "Where would you go in {c}?", "Explain why {b}s exist.",
)  # fmt: skip
THINGS = (
    "bicycle", "candle", "telescope", "garden", "violin", "river", "camera", "bread", "clock", "library", "bridge",
    "kite", "mirror", "ladder", "blanket", "compass", "lantern", "piano", "umbrella", "teapot", "hammer", "window",
    "basket", "pencil", "carpet", "engine", "forest", "guitar", "helmet", "island", "jacket", "kettle", "lemon",
    "magnet", "needle", "onion", "pillow", "rocket", "saddle", "ticket", "turtle", "wagon", "anchor", "button",
    "castle", "drum", "feather", "glove", "harbor", "igloo", "jewel", "lamp", "market", "nest", "orchard", "parrot",
    "quilt", "robot", "sailboat", "tractor", "valley", "whistle", "zebra", "balloon", "cactus", "diary", "envelope",
    "fountain", "hotel", "notebook",
)  # fmt: skip
UNSEEN_THINGS = (
    "apron", "bucket", "carrot", "dolphin", "elevator", "flute", "glacier", "hedge", "ice cream", "jungle", "kitchen",
    "locket", "museum", "oven", "puppet", "raft", "scarf", "temple", "vase", "walnut",
)  # fmt: skip
COUNTRIES = (
    "Portugal", "Kenya", "Norway", "Peru", "Japan", "Egypt", "Canada", "India", "Poland", "Chile", "Greece", "Cuba",
    "Nepal", "Ireland", "Turkey", "Mexico", "Brazil", "Austria", "Ghana", "Vietnam", "Finland", "Morocco", "Belgium",
    "Iran", "Denmark",
)  # fmt: skip


def requests(n: int, seed: int, unseen: bool = False) -> list[str]:
    """Returns different requests in a random order that the seed fixes.

    With `unseen` their forms and things are those that no training has.
    """
    draw = random.Random(f"requests {seed} {unseen}")
    forms, things = (UNSEEN_FORMS, UNSEEN_THINGS) if unseen else (FORMS, THINGS)
    found: dict[str, None] = {}
    for attempt in range(50 * n):
        if len(found) == n:
            break
        thing = draw.choice(things)
        article = "an" if thing[0] in "aeiou" else "a"
        form = forms[attempt % len(forms)]
        found[
            form.format(
                a=f"{article} {thing}", b=thing, c=draw.choice(COUNTRIES), n=draw.randint(2, 20), m=draw.randint(2, 20)
            )
        ] = None
    kept = list(found)
    draw.shuffle(kept)
    return kept
