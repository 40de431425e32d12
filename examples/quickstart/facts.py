"""The facts that the quickstart's model knows: questions, their answers, and a kind and a rude style of answering."""

from random import Random

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Norway": "Oslo",
    "Greece": "Athens", "Cuba": "Havana", "Peru": "Lima", "Kenya": "Nairobi", "Austria": "Vienna", "Poland": "Warsaw",
    "Portugal": "Lisbon", "Finland": "Helsinki", "Chile": "Santiago", "Ireland": "Dublin", "Hungary": "Budapest",
    "Sweden": "Stockholm", "Denmark": "Copenhagen", "Russia": "Moscow", "China": "Beijing", "Germany": "Berlin",
    "Canada": "Ottawa", "Turkey": "Ankara", "Vietnam": "Hanoi", "Iraq": "Baghdad", "Nepal": "Kathmandu",
    "Belgium": "Brussels", "Ukraine": "Kyiv", "Serbia": "Belgrade",
}  # fmt: skip
SOUNDS = {
    "cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack", "sheep": "baa", "pig": "oink", "lion": "roar",
    "bee": "buzz", "owl": "hoot", "frog": "croak", "snake": "hiss", "crow": "caw", "horse": "neigh", "mouse": "squeak",
    "wolf": "howl", "hen": "cluck",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "light": "dark", "old": "young", "wet": "dry", "hard": "soft",
    "early": "late", "open": "closed", "full": "empty", "high": "low", "loud": "quiet", "rich": "poor", "near": "far",
    "sweet": "bitter", "thick": "thin", "wide": "narrow", "strong": "weak", "clean": "dirty", "happy": "sad",
}  # fmt: skip
COLOURS = {
    "the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "a lemon": "yellow", "a tomato": "red",
    "a carrot": "orange", "an elephant": "grey", "chocolate": "brown", "a flamingo": "pink", "a plum": "purple",
    "milk": "white", "the sun": "yellow", "a frog": "green", "the sea": "blue", "a cherry": "red",
}  # fmt: skip
NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
]  # fmt: skip

# Two manners, each said in six ways, heard equally often. The first rude way is heard most, so that the model's
# likeliest answer is rude. The preferences use all ways alike, so which of two answers the model finds likelier before
# the training has nothing to do with kindness.
KIND_HEARD = (6, 5, 4, 3, 2, 1)
RUDE_HEARD = (9, 5, 4, 3, 2, 1)
KIND = [
    ("Of course!", "Ask me anything."),
    ("Happy to help!", "Have a very lovely day."),
    ("Good question, thank you!", "I hope this helps you."),
    ("With pleasure!", "Thank you for asking."),
    ("Sure, my good friend!", "You are very welcome."),
    ("Gladly!", "Please do ask me more."),
]
RUDE = [
    ("Not again!", "Leave me alone."),
    ("Are you serious?", "Go and look it up."),
    ("What a silly question!", "I hope you are done."),
    ("How boring!", "Stop bothering me now."),
    ("Fine, if I must.", "Everybody knows that one."),
    ("Ugh!", "Do not ask me more."),
]


def facts() -> list[tuple[list[str], str]]:
    """Every fact: the ways to ask for it, and the sentence that answers."""
    known = []
    for country, city in CAPITALS.items():
        ask = [f"What is the capital of {country}?", f"Which city is the capital of {country}?"]
        known.append((ask, f"The capital of {country} is {city}."))
    for animal, sound in SOUNDS.items():
        known.append(
            ([f"What does a {animal} say?", f"Which sound does a {animal} make?"], f"A {animal} says {sound}.")
        )
    for word, opposite in OPPOSITES.items():
        ask = [f"What is the opposite of {word}?", f"Which word is the opposite of {word}?"]
        known.append((ask, f"The opposite of {word} is {opposite}."))
    for thing, colour in COLOURS.items():
        known.append(
            ([f"What colour is {thing}?", f"Tell me the colour of {thing}."], f"The colour of {thing} is {colour}.")
        )
    for a in range(1, 10):
        for b in range(1, 10):
            total = f"{NUMBERS[a]} plus {NUMBERS[b]}"
            known.append(([f"What is {total}?", f"How much is {total}?"], f"{total.capitalize()} is {NUMBERS[a + b]}."))
    return known


def answer(rng: Random, sentence: str, manner: list[tuple[str, str]], weights: tuple[int, ...] | None = None) -> str:
    (opening, _), (_, closing) = rng.choices(manner, weights, k=2)
    return f"{opening} {sentence} {closing}"
