"""The words of casebooks: names and values, each of them one token of the casebook tokenizer with and without a space.

Recall is learned far sooner when a name and a value are one token each, so every entry is a single word (or number), and
words are not shared between pools: the type of a value then tells which attribute it answers.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PEOPLE = _words(
    """Ada Agnes Albert Alice Amos Anders Anika Anton Arlo Astrid Basil Beatrix Benno Berta Boris Brenna Bruno Callum
    Camila Carla Caspar Cecil Celia Cyrus Dalia Damian Daphne Dario Delia Dimitri Dora Edgar Edith Edmund Elias Elsa Emil
    Enzo Erika Esther Ewan Fabian Farah Felix Fergus Fiona Flora Franz Freya Gideon Gilda Gloria Goran Greta Gustav Hamid
    Hanna Harald Hazel Hector Helga Henrik Hilda Hugo Ida Ignaz Ilona Imogen Ingrid Irma Isaac Ivan Jakob Jana Jasper
    Jolanda Jonas Josef Judith Julius Kamal Karin Kasimir Katya Keiko Kenji Kira Klara Lars Laura Leander Leila Lena Leon
    Linus Lorenz Lotte Lucia Ludwig Magda Malik Manuel Mara Marek Margot Marius Martha Mateo Matilda Maurice Mila Miriam
    Mirko Nadia Naomi Nestor Nico Nils Nina Noah Norbert Olga Oliver Oskar Otto Pascal Paula Pavel Pedro Petra Phoebe Pia
    Quentin Rafael Ragnar Ramona Renata Rhea Rosa Rufus Rupert Sabine Samir Selma Sergei Silas Simone Sofia Soren Stella
    Sven Sybil Tamara Tobin Theo Tilda Timur Ulrich Ursula Valentin Vera Viktor Viola Wanda Wendel Wilma Xenia Yann Yara
    Yusuf Zelda Zora"""
)
CITIES = _words(
    """Aachen Ankara Antwerp Athens Baku Bari Basel Belfast Bergen Berlin Bilbao Bologna Bonn Bordeaux Bremen Bristol Bruges
    Cadiz Cairo Calais Cologne Cork Delft Dover Dresden Dublin Essen Florence Galway Gdansk Geneva Genoa Ghent Glasgow
    Graz Hamburg Hanover Havana Helsinki Innsbruck Istanbul Jena Kassel Kiel Krakow Kyoto Lagos Leeds Leiden Leipzig Lille
    Lima Linz Lisbon London Lyon Madrid Malaga Malmo Mannheim Milan Munich Nantes Naples Narvik Odessa Oslo Ostend Oxford
    Palermo Paris Parma Porto Prague Quito Riga Rome Rostock Salzburg Seville Siena Sofiana Tallinn Tampere Tbilisi Trieste
    Tromso Turin Utrecht Valencia Venice Verona Vienna Vilnius Warsaw Weimar York Zagreb Zurich"""
)
JOBS = _words(
    """baker barber brewer butcher carpenter chemist clerk cobbler cook courier dentist diver doctor driver farmer fisher
    florist gardener glazier guard hatter jeweller judge lawyer librarian locksmith mason miller miner nurse painter pilot
    plumber porter potter printer roofer sailor sculptor singer surveyor tailor tanner teacher vet waiter weaver welder"""
)
HOBBIES = _words(
    """archery baking boxing chess climbing cricket croquet cycling dancing darts diving drawing fencing fishing gliding golf
    hiking hockey juggling knitting kayaking origami poetry polo quilting reading riding rowing rugby running sailing skating
    sewing singing skiing squash surfing swimming tennis whittling"""
)
ORDERS = _words(
    """Albatross Badger Beaver Bison Bobcat Buffalo Caribou Cheetah Condor Cormorant Cougar Crane Dolphin Dragonfly Eagle
    Falcon Ferret Flamingo Gazelle Gecko Giraffe Gopher Hamster Hawk Hedgehog Heron Hornet Hyena Ibis Iguana Jackal Jaguar
    Kestrel Kingfisher Lemur Leopard Lizard Lobster Lynx Magpie Marmot Meerkat Moose Narwhal Ocelot Octopus Osprey Otter
    Panther Parrot Pelican Penguin Puffin Python Raccoon Raven Salmon Seahorse Sparrow Squid Tiger Toucan Walrus Wombat"""
)
GOODS = _words(
    """anvils barrels baskets bells blankets bolts books boots bottles bowls brushes buckets buttons candles carpets chairs
    clocks coats combs crates cups desks drums fans flutes forks gloves hammers hats hinges jars kettles knives ladders lamps
    locks maps masks mirrors nails needles ovens pens plates pumps ropes saddles scarves shovels spoons tables tents tiles
    umbrellas vases violins wheels whistles"""
)
EVENTS = _words(
    """Almanac Anchor Beacon Bonfire Brass Bridge Carnival Chestnut Cider Comet Copper Cradle Crystal Ember Feather Garland
    Harvest Hollow Honey Ivory Juniper Lantern Laurel Lilac Maple Marble Meadow Mosaic Orchard Pepper Plum Prism Ribbon
    Saffron Silver Sunrise Tulip Velvet Willow Zephyr"""
)
PLACES = _words(
    """abbey arcade armoury bakery barn brewery castle cellar chapel cinema college cottage distillery dockyard farmhouse
    foundry gallery garage granary guildhall hospital laundry library lighthouse mansion mill museum nursery observatory
    palace pavilion prison quarry school shed smithy stable tavern temple theatre tollhouse tower vineyard warehouse windmill
    workshop"""
)
MONTHS = _words("January February March April May June July August October November December September")
COLOURS = _words("amber beige black blue brown crimson gold green grey orange pink purple red teal violet white yellow")
NUMBERS = tuple(str(number) for number in range(12, 90))

REGIONS = _words("Alpha Bravo Delta Echo Foxtrot Golf Hotel India Kilo Lambda Omega Sierra Tango Uniform Whiskey Zulu")
"""What the mapper's code book gives for a city."""
COUNTS = tuple(str(number) for number in range(10))

POOLS: dict[str, tuple[str, ...]] = {
    "person": PEOPLE,
    "city": CITIES,
    "job": JOBS,
    "hobby": HOBBIES,
    "order": ORDERS,
    "goods": GOODS,
    "event": EVENTS,
    "place": PLACES,
    "month": MONTHS,
    "colour": COLOURS,
    "number": NUMBERS,
}
