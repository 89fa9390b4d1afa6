"""Owns the tables of facts the model learns: capitals, colours, the calendar.

Wordings of questions are not here, and neither are the longer definitions.
"""

from __future__ import annotations

from demo.intents import words_of

CAPITALS: dict[str, str] = {
    "Argentina": "Buenos Aires",
    "Australia": "Canberra",
    "Austria": "Vienna",
    "Belgium": "Brussels",
    "Brazil": "Brasília",
    "Bulgaria": "Sofia",
    "Canada": "Ottawa",
    "Chile": "Santiago",
    "China": "Beijing",
    "Colombia": "Bogotá",
    "Croatia": "Zagreb",
    "Cuba": "Havana",
    "Denmark": "Copenhagen",
    "Egypt": "Cairo",
    "Estonia": "Tallinn",
    "Finland": "Helsinki",
    "France": "Paris",
    "Germany": "Berlin",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "Iceland": "Reykjavík",
    "India": "New Delhi",
    "Indonesia": "Jakarta",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Latvia": "Riga",
    "Mexico": "Mexico City",
    "Morocco": "Rabat",
    "Nepal": "Kathmandu",
    "the Netherlands": "Amsterdam",
    "New Zealand": "Wellington",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Romania": "Bucharest",
    "Russia": "Moscow",
    "South Korea": "Seoul",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Switzerland": "Bern",
    "Thailand": "Bangkok",
    "Turkey": "Ankara",
    "Ukraine": "Kyiv",
    "the United Kingdom": "London",
    "the United States": "Washington",
    "Vietnam": "Hanoi",
}

COUNTRY_ALIASES: dict[str, tuple[str, ...]] = {
    "the Netherlands": ("the Netherlands", "Netherlands", "Holland"),
    "the United Kingdom": ("the United Kingdom", "the UK", "UK", "Great Britain", "Britain"),
    "the United States": ("the United States", "the USA", "the US", "USA", "the United States"),
    "South Korea": ("South Korea", "Korea"),
}

UNKNOWN_COUNTRIES: tuple[str, ...] = words_of("""
Atlantis, Mordor, Narnia, Wakanda, Zambia, Paraguay, Oman, Laos, Chad, Mali, Fiji, Malta, Gondor,
Utopia, Texas, California, Bavaria, Tasmania, Bhutan, Togo, Gabon, Samoa, Yemen, Qatar, Kuwait,
Panama, Haiti, Jamaica, Honduras, Uganda, Rwanda, Botswana, Namibia, Senegal, Ghana, Libya, Sudan,
Tuvalu, Mars, Middle-earth, Scotland, Wales, Sicily, Florida, Ohio, Quebec, Hawaii, Mongolia,
Kazakhstan
""")

COLOURS: dict[str, str] = {
    "the sky": "blue",
    "the sea": "blue",
    "the sun": "yellow",
    "grass": "green",
    "a leaf": "green",
    "a frog": "green",
    "a cucumber": "green",
    "a lime": "green",
    "spinach": "green",
    "broccoli": "green",
    "an emerald": "green",
    "a banana": "yellow",
    "a lemon": "yellow",
    "a canary": "yellow",
    "mustard": "yellow",
    "butter": "yellow",
    "a sunflower": "yellow",
    "snow": "white",
    "milk": "white",
    "salt": "white",
    "rice": "white",
    "a swan": "white",
    "chalk": "white",
    "blood": "red",
    "a tomato": "red",
    "a strawberry": "red",
    "a fire truck": "red",
    "a ruby": "red",
    "a cherry": "red",
    "coal": "black",
    "tar": "black",
    "a raven": "black",
    "the night": "black",
    "a carrot": "orange",
    "a pumpkin": "orange",
    "an orange": "orange",
    "chocolate": "brown",
    "coffee": "brown",
    "wood": "brown",
    "mud": "brown",
    "an eggplant": "purple",
    "a plum": "purple",
    "lavender": "purple",
    "a flamingo": "pink",
    "a pig": "pink",
    "an elephant": "grey",
    "ash": "grey",
    "concrete": "grey",
    "gold": "yellow",
    "a sapphire": "blue",
}

DAYS: tuple[str, ...] = (
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
)

DAYS_IN_MONTH: dict[str, str] = {
    "January": "31 days",
    "February": "28 days, or 29 in a leap year",
    "March": "31 days",
    "April": "30 days",
    "May": "31 days",
    "June": "30 days",
    "July": "31 days",
    "August": "31 days",
    "September": "30 days",
    "October": "31 days",
    "November": "30 days",
    "December": "31 days",
}

ORDINALS: tuple[tuple[str, str], ...] = (
    ("first", "1st"),
    ("second", "2nd"),
    ("third", "3rd"),
    ("fourth", "4th"),
    ("fifth", "5th"),
    ("sixth", "6th"),
    ("seventh", "7th"),
    ("eighth", "8th"),
    ("ninth", "9th"),
    ("tenth", "10th"),
    ("eleventh", "11th"),
    ("twelfth", "12th"),
)

UNITS: tuple[tuple[str, str, str], ...] = (
    ("days", "a week", "7"),
    ("months", "a year", "12"),
    ("days", "a year", "365"),
    ("weeks", "a year", "52"),
    ("hours", "a day", "24"),
    ("minutes", "an hour", "60"),
    ("seconds", "a minute", "60"),
)

NUMBER_WORDS: tuple[str, ...] = words_of("""
zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen,
fourteen, fifteen, sixteen, seventeen, eighteen, nineteen, twenty
""")
