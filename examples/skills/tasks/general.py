"""Plain questions that need none of the skills, which the meta LLM should answer itself."""

import random
import re

from .base import Task

DESCRIPTION = "everyday knowledge"

_CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "China": "Beijing",
    "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Portugal": "Lisbon", "Austria": "Vienna",
    "Norway": "Oslo", "Sweden": "Stockholm", "Poland": "Warsaw", "Ireland": "Dublin", "Cuba": "Havana",
    "Peru": "Lima", "Kenya": "Nairobi", "Thailand": "Bangkok", "Hungary": "Budapest", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Iran": "Tehran", "Iraq": "Baghdad", "India": "New Delhi", "Canada": "Ottawa",
    "Belgium": "Brussels", "Chile": "Santiago", "Argentina": "Buenos Aires", "Turkey": "Ankara",
    "South Korea": "Seoul", "the United Kingdom": "London", "the Czech Republic": "Prague", "Ukraine": "Kyiv",
}  # fmt: skip
_OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "light": "dark", "happy": "sad", "full": "empty", "rich": "poor",
    "young": "old", "high": "low", "wet": "dry", "hard": "soft", "loud": "quiet", "early": "late", "strong": "weak",
    "love": "hate", "open": "closed", "long": "short", "heavy": "light", "clean": "dirty", "begin": "end",
    "buy": "sell", "win": "lose", "true": "false", "left": "right", "up": "down", "day": "night", "east": "west",
    "north": "south", "friend": "enemy", "war": "peace", "good": "bad", "inside": "outside",
}  # fmt: skip
_FACTS = {
    "Which planet is closest to the Sun?": "Mercury",
    "Which planet do we live on?": "Earth",
    "Which planet is known as the red planet?": "Mars",
    "Which planet is the largest in the solar system?": "Jupiter",
    "Which gas do plants take in from the air?": "carbon dioxide",
    "Which gas do people need to breathe?": "oxygen",
    "What do bees make?": "honey",
    "What is frozen water called?": "ice",
    "What is the largest ocean on Earth?": "Pacific",
    "Who wrote Romeo and Juliet?": "Shakespeare",
    "Who painted the Mona Lisa?": "Leonardo",
    "Who developed the theory of relativity?": "Einstein",
    "What is the tallest mountain in the world?": "Everest",
    "What language is spoken in Brazil?": "Portuguese",
    "What is the chemical formula of water?": "H2O",
    "What is the chemical symbol of gold?": "Au",
    "Which animal is called the king of the jungle?": "lion",
    "Which organ pumps blood through the body?": "heart",
    "What colour is the sky on a clear day?": "blue",
    "What colour is grass?": "green",
    "What colour is snow?": "white",
    "What colour is a ripe banana?": "yellow",
    "What colour do you get from mixing red and white?": "pink",
    "Which star does the Earth go around?": "Sun",
    "What goes around the Earth at night and shines?": "Moon",
    "Which animal says moo?": "cow",
    "Which animal says meow?": "cat",
    "Which animal is man's best friend?": "dog",
    "What do cows give us to drink?": "milk",
    "What do we call a baby dog?": "puppy",
    "What do we call a baby cat?": "kitten",
    "What is the largest animal in the ocean?": "whale",
    "What is the tallest animal on land?": "giraffe",
    "Who wrote Hamlet?": "Shakespeare",
    "Who was the first president of the United States?": "Washington",
    "Who discovered penicillin?": "Fleming",
    "Who invented the telephone?": "Bell",
    "On which continent is Egypt?": "Africa",
    "On which continent is China?": "Asia",
    "On which continent is France?": "Europe",
    "In which country is the Eiffel Tower?": "France",
    "In which country is the Great Wall?": "China",
    "In which country are the pyramids of Giza?": "Egypt",
    "What language is spoken in Germany?": "German",
    "What language is spoken in Japan?": "Japanese",
    "What is the chemical symbol of oxygen?": "O",
    "What is the chemical symbol of iron?": "Fe",
    "What is the longest river in Africa?": "Nile",
    "What do caterpillars turn into?": "butterflies",
    "Which season comes after winter?": "spring",
    "Which sense do we use our ears for?": "hearing",
    "Which sense do we use our eyes for?": "sight",
    "What do we breathe with?": "lungs",
    "What is bread made from?": "flour",
    "What is the hardest natural material?": "diamond",
}
_QUESTIONS = (
    [Task(f"What is the capital of {country}?", city) for country, city in _CAPITALS.items()]
    + [Task(f"What is the opposite of {word}?", other) for word, other in _OPPOSITES.items()]
    + [Task(question, answer) for question, answer in _FACTS.items()]
)


def make_task(rng: random.Random) -> Task:
    """Draw a question from a fixed list."""
    return rng.choice(_QUESTIONS)


def score(response: str, answer: str) -> float:
    """Return 1 if the response contains the answer as a whole word, else 0."""
    return float(re.search(rf"\b{re.escape(answer)}\b", response, re.IGNORECASE) is not None)
