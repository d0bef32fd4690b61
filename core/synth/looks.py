"""How each genre looks and sounds: palettes, lettering and the words of its titles.

Two palettes a genre, so that colour hints at a genre without giving it away.
"""

from __future__ import annotations

from dataclasses import dataclass

from .canvas import Colour, Palette
from .lettering import Lettering


@dataclass(frozen=True, kw_only=True)
class Look:
    """A genre's means of saying what it is, besides its scene."""

    palettes: tuple[Palette, ...]
    lettering: Lettering
    words: tuple[str, ...]
    """Nouns for titles."""


def _palette(colours: str) -> Palette:
    """From "sky ground ink accent light", each six hexadecimal digits."""

    def rgb(digits: str) -> Colour:
        return (int(digits[0:2], 16), int(digits[2:4], 16), int(digits[4:6], 16))

    sky, ground, ink, accent, light = (rgb(digits) for digits in colours.split())
    return Palette(sky=sky, ground=ground, ink=ink, accent=accent, light=light)


def _look(first: str, second: str, lettering: Lettering, words: str) -> Look:
    palettes = (_palette(first), _palette(second))
    return Look(palettes=palettes, lettering=lettering, words=tuple(words.split()))


LOOKS: dict[str, Look] = {
    "Action": _look(
        "2a120a d9541e 0c0706 ffb52e fff0c2",
        "4a1c0c e8892b 08090c ffd23f ffe3b0",
        Lettering(weight=0.07, width=0.8, slant=0.22, outline=True),
        "Impact Strike Force Overdrive Bullet Fury Payback Collision Velocity",
    ),
    "Adventure": _look(
        "f6c667 2f7d4f 173d2b e4572e fff3c4",
        "8fd3e8 7f9a3c 38340f ffb627 fff8e0",
        Lettering(weight=0.05, width=1.1, spacing=0.06, outline=True),
        "Expedition Island Summit Voyage Compass River Treasure Horizon",
    ),
    "Animation": _look(
        "35c3ff 8be04e 20304f ff4f9a ffe94a",
        "ff9a3d ff5db1 40206b 36e0c8 fff59a",
        Lettering(weight=0.09, tilt=14, upper=False, outline=True),
        "Pip Noodle Bubbles Critters Wobble Puddle Robots Dragonling",
    ),
    "Biography": _look(
        "d8c3a0 7b5a3c 2e1f14 9c2f24 f6ead2",
        "b9ab96 5c4a38 1f1812 c79a3c efe4d0",
        Lettering(weight=0.0, spacing=0.22, width=0.95),
        "Life Letters Portrait Genius Years Diaries Inventor Verdi Curie",
    ),
    "Comedy": _look(
        "ffffff ffe85c 25303a e8262d ffffff",
        "fff3d6 8fdcf5 2b2b36 ff5a13 ffffff",
        Lettering(weight=0.08, tilt=6, width=0.95, outline=True),
        "Wedding Roommates Holiday Neighbours Cousin Vacation Boss Diet",
    ),
    "Crime": _look(
        "0a0a0d 3a3f4a 000000 c4141b e8e2cf",
        "120c0c 4d3a34 050302 d61f1f f5e3b3",
        Lettering(weight=0.05, width=0.62, spacing=0.04),
        "Heist Alibi Syndicate Evidence Informant Vault Precinct Debt",
    ),
    "Documentary": _look(
        "f2efe6 d9d4c5 222222 2a6f97 ffffff",
        "e4eaec b4c6cc 1c2526 2f7f8f ffffff",
        Lettering(weight=0.0, width=0.9, spacing=0.1, upper=False),
        "Water Harvest Archive Voices Plastic Ice Bees Machine",
    ),
    "Drama": _look(
        "8fa3b0 43525e 1a2127 d8c9a6 f3efe6",
        "a9aeb0 5e6570 20242b b08d6a f1efe9",
        Lettering(weight=0.0, width=0.85, spacing=0.3),
        "Winter Silence Daughter Harbour House Distance Ashes Sunday",
    ),
    "Family": _look(
        "6ec6ff 6cc24a 2b4c1f ff5a4f fff7c2",
        "8fd0ff 58b368 2f3a1a ff7f3f fffbe6",
        Lettering(weight=0.08, tilt=5, upper=False, outline=True),
        "Puppy Garden Grandpa Kite Treehouse Birthday Pony Pancakes",
    ),
    "Fantasy": _look(
        "2a1454 7a3fb8 140a2b f7c948 e9d5ff",
        "1b1f6b 9a4fc0 0d0a2b ffd98a f2e5ff",
        Lettering(weight=0.02, width=0.85, spacing=0.12, outline=True),
        "Sorcerer Crown Thorn Realm Raven Enchantment Stone Dragon",
    ),
    "History": _look(
        "e3c98f a9793a 4a2f14 7a1e1e fbefcf",
        "d3ad6a 7b5428 2a180b 8c2a22 f5e2b8",
        Lettering(weight=0.03, width=1.15, spacing=0.14),
        "Empire Treaty Queen Revolution Senate Dynasty Siege Republic",
    ),
    "Horror": _look(
        "000000 2b0505 000000 b30000 d8d2c4",
        "0a0a08 2d1512 020202 c41414 e5e0d0",
        Lettering(weight=0.02, width=0.7, tilt=7, spacing=0.05),
        "Cellar Whisper Curse Possession Asylum Teeth Ritual Hollow",
    ),
    "Music": _look(
        "2b0b3f c2185b 12041c 00e5ff ffd6f5",
        "1a0a30 e0389a 0a0618 3df0ff ffe0f5",
        Lettering(weight=0.06, slant=0.15, width=1.05),
        "Encore Vinyl Rhythm Chorus Amplifier Tour Bassline Echo",
    ),
    "Musical": _look(
        "5c0a14 b3122a 1d0307 ffd24a fff4cf",
        "6a1030 c01a3a 22040e ffdf6a fff4d8",
        Lettering(weight=0.05, spacing=0.12, outline=True),
        "Broadway Serenade Curtain Footlights Tango Melody Spotlight",
    ),
    "Mystery": _look(
        "0d2226 3d6b6b 050e10 cfe8d5 dff5ea",
        "12262e 4f7a78 060f14 e2e8b0 ecf2d2",
        Lettering(weight=0.0, width=0.75, spacing=0.2),
        "Lighthouse Stranger Cipher Disappearance Fog Key Room Witness",
    ),
    "N/A": _look(
        "9a9a9a 7d7d7d 5c5c5c b5b5b5 d0d0d0",
        "b2b0ae 8c8a88 6a6866 c4c2c0 dcdad8",
        Lettering(weight=0.0, spacing=0.1),
        "Reel Footage Tape Print Copy",
    ),
    "News": _look(
        "f5f5f0 e6e6df 111111 c8102e ffffff",
        "ecebe6 d2d2d0 1a1a1a d0021b ffffff",
        Lettering(weight=0.08, width=0.7),
        "Headline Bulletin Deadline Broadcast Correspondent Ballot",
    ),
    "Reality-TV": _look(
        "00b8c4 ff3d9a 1b1035 fff04a ffffff",
        "7b2ff7 00e0c4 180a35 ffe04a ffffff",
        Lettering(weight=0.09, slant=0.12, tilt=4, outline=True),
        "Housemates Finalists Makeover Casting Kitchen Challenge",
    ),
    "Romance": _look(
        "ffd1dc f48fb1 7a1f3d d81b60 fff3f5",
        "ffd9c8 ec7f8f 5c2230 c2184a fff4e8",
        Lettering(weight=0.0, slant=0.35, upper=False, spacing=0.0),
        "Heart Kiss Summer Paris Promise Valentine Dance Letter",
    ),
    "Sci-Fi": _look(
        "02040f 0f2c66 01020a 21e6ff dff9ff",
        "040a1c 10508c 02040d 35ffd8 e7fff8",
        Lettering(weight=0.03, width=1.45, spacing=0.2),
        "Orbit Quantum Colony Android Nebula Singularity Titan Signal",
    ),
    "Short": _look(
        "fafafa f0f0f0 1e1e1e 222222 ffffff",
        "f7efe6 f0e2d4 26201c e0662a ffffff",
        Lettering(weight=0.0, upper=False, spacing=0.05, width=0.9),
        "Lunch Stairs Orange Minute Window Tuesday Spoon",
    ),
    "Sport": _look(
        "7fc98a 1f6b2e 0b2a12 ffffff f7ffe8",
        "9fd0e8 2a7f3a 0a2a16 ffffff fff2dd",
        Lettering(weight=0.1, width=0.85, slant=0.18, outline=True),
        "Season Champions Overtime Underdogs League Coach Sprint Ring",
    ),
    "Thriller": _look(
        "0b1014 27404d 020405 d9e021 eef6d6",
        "101418 34464a 060809 e6e63a f4f4e0",
        Lettering(weight=0.05, width=0.7, spacing=0.1),
        "Hostage Pursuit Motive Deadfall Tunnel Conspiracy Breach Target",
    ),
    "War": _look(
        "5a5a3c 8a7a4a 1d1c12 b5542a e6dcb4",
        "6a6a50 75663c 1a180f c8642a e9e2d0",
        Lettering(weight=0.06, width=0.9, spacing=0.08),
        "Regiment Trenches Front Convoy Armistice Battalion Letters",
    ),
    "Western": _look(
        "f6a04d b5492a 3a160b 7a1f12 ffe6b0",
        "f2b262 a8562b 2e1a0b 8e2a14 fff0cc",
        Lettering(weight=0.09, width=1.2, spacing=0.04, outline=True),
        "Gunslinger Canyon Sheriff Mesa Outlaw Stagecoach Dust Rio",
    ),
}
"""Genre to look: one for every name in `core.synth.labels.GENRES`."""

TITLE_FORMS = (
    "The {a}",
    "{a} of {b}",
    "The Last {a}",
    "My {a} and {b}",
    "{a}",
    "Beyond the {a}",
    "{a} & {b}",
    "No {a}",
    "{a} in {b}",
    "The {a} Club",
    "{a} for {b}",
    "Red {a}",
    "{a} {n}",
)
"""Patterns of titles: `a` and `b` are nouns of the poster's genres, `n` a number of a sequel."""

FIRST_NAMES = (
    "Ada", "Bo", "Cleo", "Dario", "Edda", "Finn", "Greta", "Hugo", "Ines", "Jory", "Kai", "Lena",
    "Milo", "Nora", "Otis", "Pia",
)  # fmt: skip
LAST_NAMES = (
    "Abel", "Brandt", "Castell", "Dorn", "Ekman", "Faro", "Gruber", "Holt", "Ivers", "Juno",
    "Kessel", "Lind", "Marr",
)  # fmt: skip
