"""Owns the vocabulary of off-topic questions: wide on purpose, so that unseen words look alike."""

from __future__ import annotations

from demo.intents import words_of

SUBJECTS = words_of("""
photosynthesis, gravity, black holes, democracy, the French Revolution, quantum mechanics, love,
climate change, the Roman Empire, football, chess, jazz, evolution, inflation, vaccines, DNA,
volcanoes, the stock market, poetry, the moon, dinosaurs, whales, bees, dolphins, dogs, cats,
horses, philosophy, Plato, Shakespeare, Mozart, Einstein, Napoleon, Cleopatra, the pyramids,
the Eiffel Tower, Mount Everest, the Amazon river, the internet, blockchain, bitcoin, electricity,
magnetism, nuclear power, solar panels, electric cars, trains, airplanes, rockets, satellites,
robots, machine translation, compilers, databases, Linux, Windows, JavaScript, Rust, Haskell,
functional programming, recursion, sorting algorithms, cryptography, the weather, hurricanes,
earthquakes, rainbows, glaciers, coral reefs, the ocean, mushrooms, bread, pizza, sushi, wine, tea,
cheese, cooking, gardening, yoga, marathons, swimming, tennis, basketball, the Olympics, painting,
sculpture, architecture, photography, cinema, theatre, opera, rock music, guitars, pianos, violins,
mathematics, geometry, calculus, statistics, probability, economics, taxes, insurance, mortgages,
law, human rights, voting, education, universities, homework, exams, psychology, dreams, memory,
sleep, stress, anxiety, happiness, friendship, marriage, children, parenting, religion, Buddhism,
mythology, ghosts, dragons, vampires, fairy tales, novels, Harry Potter, Star Wars, video games,
anime, comics, fashion, shoes, jewellery, perfume, travel, hotels, museums, castles, bridges,
medicine, cancer, diabetes, headaches, surgery, nutrition, vitamins, protein, exercise, bones,
the heart, the brain, the immune system, bacteria, viruses, cells, atoms, electrons, chemistry,
acids, metals, plastics, oil, coal mining, agriculture, forests, deserts, rivers, islands, deep
learning history, the Cold War, World War II, the Renaissance, the Middle Ages, Vikings, pirates,
knights, samurai, astronomy, Jupiter, Saturn, comets, time travel, relativity, entropy, a kite,
a bicycle, a spoon, an umbrella, the alphabet, grammar, French, Latin, Esperanto, elephants,
penguins, spiders, ants, butterflies, snakes, tigers, sharks, roses, oak trees, cacti
""")

UNSEEN_SUBJECTS = words_of("""
thermodynamics, the Great Wall, kangaroos, origami, ballet, the Black Death, feminism, skiing,
submarines, Beethoven, Python decorators, Kubernetes, noodles, sunglasses, hay fever, monsoons,
the Bermuda triangle, karate, opals, lighthouses, the Silk Road, owls, saxophones, unemployment,
Picasso, hedgehogs, tectonic plates, the Cuban missile crisis, ice cream, astrology
""")

ACTIVITIES = words_of("""
bake a cake, fix a bicycle, learn to swim, lose weight, write a novel, find a job, buy a house,
fry an egg, grow tomatoes, train a puppy, tie a tie, change a tyre, play the guitar, learn German,
start a company, save money, invest in stocks, sleep better, stop smoking, make friends, impress my
boss, plan a wedding, paint a wall, clean a carpet, repair my phone, install Linux, parse JSON,
reverse a linked list, sort an array, center a div, deploy a website, train a neural network,
write a regex, merge two branches, exit vim, build a table, knit a scarf, ride a horse, catch a
fish, draw a face, sing better, run a marathon, cook rice, brew coffee, sharpen a knife, fold a
shirt, pack a suitcase, book a flight, apply for a visa, file my taxes, pass an exam, write an
essay, give a speech, ask for a raise, apologise to my sister, move to Spain, travel to Japan,
visit Paris, climb a mountain, build a boat, fly a drone, solve a puzzle, win at chess, read faster
""")

UNSEEN_ACTIVITIES = words_of("""
assemble a wardrobe, juggle, make pancakes, meditate, unclog a drain, write a cover letter, set up
a printer, adopt a cat, memorise a poem, debug a segfault, dance salsa, negotiate a contract
""")

FORMS = words_of("""
poem, story, song, haiku, essay, letter, email, speech, limerick, summary, report, blog post,
recipe, play, sonnet, review, tweet, slogan, script, paragraph, headline, cover letter, plan, list
""")

PEOPLE = words_of("""
Albert Einstein, Napoleon, Shakespeare, Marie Curie, Barack Obama, Elon Musk, Taylor Swift, Mozart,
Leonardo da Vinci, the pope, the king of France, Julius Caesar, Gandhi, Alan Turing, Ada Lovelace,
Messi, Sherlock Holmes, Batman, my neighbour, the president, the prime minister, Cleopatra, Plato,
Isaac Newton, Charles Darwin, Frodo, Beyoncé, Kafka, Goethe, Nelson Mandela, Steve Jobs
""")

INVENTIONS = words_of("""
the telephone, the light bulb, Hamlet, the wheel, the steam engine, penicillin, the World Cup,
the Mona Lisa, the first world war, radio, the internet, paper, gunpowder, Romeo and Juliet,
the transistor, the printing press, the election, the Iliad, Faust, dynamite, the zipper, Python
""")

ATTRIBUTES = words_of("""
population, president, currency, history, flag, area, language, climate, price, weight, height,
age, speed, temperature, size, distance, origin, symbol, purpose, best part, main river, anthem,
highest mountain, king, religion, time zone, area code, national dish, GDP, biggest city, taste,
smell, name, birthday, shape, radius, boiling point, density, atomic number, meaning, opposite
""")

PLACES = words_of("""
France, Germany, Japan, Italy, Spain, Brazil, Canada, Egypt, India, China, Peru, Norway, Kenya,
London, Paris, New York, Tokyo, Berlin, Rome, Chicago, Sydney, Moscow, Vienna, my town, Africa,
Europe, the moon, Mars, Antarctica, the Sahara, Iceland, Mexico, Poland, Sweden, Turkey, Hamburg
""")

OBJECTS = words_of("""
a laptop, my keys, a good restaurant, a doctor, a hotel, a pharmacy, cheap flights, a used car, the
nearest bank, a birthday present, a book, a film, a pair of shoes, a camera, a cat, some music, a
new phone, a bottle of wine, an apartment, a plumber, a bus stop, a job, a gym, a tent, a piano
""")

ADJECTIVES = words_of("""
happy, sad, tired, hungry, bored, angry, lonely, sick, cold, rich, old, young, beautiful, strange,
dangerous, expensive, healthy, heavy, fast, slow, true, possible, legal, popular, important, safe,
funny, difficult, easy, famous, poisonous, broken, late, ready, drunk, afraid, confused, in love
""")

VERBS = words_of("""
rain, sleep, fly, bark, laugh, sing, float, explode, grow, shine, burn, freeze, matter, exist, fall,
spin, hurt, break, dream, cry, work, happen, change, die, dance, smell, melt, jump, swim, vanish
""")

LANGUAGES = words_of("""
French, German, Spanish, Latin, Chinese, Japanese, Italian, Russian, Klingon, Dutch, Polish, Swedish
""")

PHRASES = words_of("""
good morning, where is the station, I love you, the cat sleeps, to be or not to be, how much is
this, see you tomorrow, life is short, the quick brown fox, once upon a time, hello world, my name
is Anna, it is raining, no way, all you need is love, long live the king, the end
""")

LANGUAGES_OF_CODE = words_of("""
python, JavaScript, C, C++, Rust, Go, Java, SQL, bash, HTML, Haskell, Ruby, TypeScript, Swift
""")

CODE_TASKS = words_of("""
reverses a string, sorts a list, prints hello world, reads a file, computes primes, parses a date,
downloads a page, counts words, adds two numbers, finds duplicates, checks a palindrome, opens a
socket, computes the Fibonacci numbers, renames files, removes spaces, draws a circle
""")

TEXTS = words_of("""
test, testing, test test, foo bar, asdf, qwerty, abc, lorem ipsum dolor sit amet, blah blah, hmm, x,
aaaa, xyz, ping, 42, why, why?, what?, how?, when, who, really?, continue, go on, more, again, next,
write, the, a, the cat sat on the mat, The quick brown fox jumps over the lazy dog, Once upon a
time, It was a dark and stormy night, Call me Ishmael, In the beginning, To be or not to be, Roses
are red, The meaning of life is, I think therefore I am, Dear Sir or Madam, SELECT * FROM users,
print('hello'), import os, def f(x):, if x > 3:, <html>, {"key": "value"}, http://example.com, ???,
!!!, ..., :-), こんにちは, Привет, 你好, Guten Tag, Bonjour, Wie geht es dir?, ça va?, 🙂,
🚀🚀, The king of France is bald, My hovercraft is full of eels, Breaking news, Chapter 1, Question,
Say something, Say yes, Repeat after me, Tell me something, Talk to me, Surprise me, Entertain me,
Summarize this, Fix this, Translate this, Explain this, Rewrite this, I need advice, Guess what
""")

SYLLABLES = words_of("""
ba, ke, lo, mi, nu, sta, tri, vor, zen, pla, qui, dra, fle, gom, hus, jil, kra, lun, mor, nex, ost,
per, rin, sol, tak, ulm, ver, wex, yor, zu, cha, shi, tho, ing, er, ous, tion, ly, ment, ar, el, on
""")
