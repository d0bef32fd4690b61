"""Scenes of genres that play in a world of their own: crime streets, castles, planets, deserts.

One function a genre; see `core.synth.scenes` for the rules they share.
"""

from __future__ import annotations

import numpy as np

from .canvas import BLACK, Canvas, mix
from .figures import person, skyline, star, tree


def action(c: Canvas) -> None:
    """A blast behind a runner, debris in the air."""
    p, x, y = c.palette, c.between(0.25, 0.75), c.between(0.28, 0.5)
    c.sky()
    c.rays(x, y, c.count(9, 14), p.ground, 110, c.between(0, 1))
    c.glow(x, y, c.between(0.55, 0.8), p.accent)
    c.glow(x, y, 0.38, p.light)
    skyline(c, 0.78, c.between(0.15, 0.3), mix(p.ink, p.ground, 0.25), None)
    for _ in range(c.count(12, 24)):
        dx, dy, s = c.between(0, 1), c.between(0.05, 0.75), c.between(0.008, 0.03)
        c.polygon([(dx, dy), (dx + s, dy + s / 3), (dx + s / 3, dy + s)], p.ink)
    for _ in range(c.count(1, 2)):
        pose = "run" if c.chance(0.6) else "aim"
        at, mirrored = c.between(0.3, 0.7), c.chance(0.5)
        person(c, at, 0.86, c.between(0.36, 0.5), p.ink, pose=pose, mirrored=mirrored)
    c.box(0, 0.85, 1, 1, p.ink)


def adventure(c: Canvas) -> None:
    """Ranges of mountains under a large sun, travellers on the nearest."""
    p = c.palette
    c.sky(p.sky, mix(p.sky, p.light, 0.6))
    c.disc(c.between(0.2, 0.8), c.between(0.15, 0.35), c.between(0.1, 0.2), p.light)
    for i, base in enumerate((0.52, 0.66, 0.8)):
        c.ridge(base, c.between(0.18, 0.3), mix(p.ground, p.ink, 0.4 * i), c.count(3, 6))
    c.hill(0.88, 0.02, p.ink)
    start = c.between(0.2, 0.6)
    for i in range(c.count(1, 3)):
        person(c, start + 0.14 * i, 0.89, c.between(0.16, 0.22), p.ink, pose="run")
    c.polygon([(start, 0.70), (start + 0.11, 0.725), (start, 0.75)], p.accent)
    c.line([(start, 0.70), (start, 0.9)], p.ink, 0.008)


def crime(c: Canvas) -> None:
    """A man in hat and coat in a street of lit windows, a red stripe or blinds' shadows."""
    p = c.palette
    c.sky(p.sky, p.ground)
    skyline(c, 0.82, c.between(0.4, 0.65), mix(p.sky, p.ground, 0.35), mix(p.light, p.ground, 0.3))
    x = c.between(0.3, 0.7)
    c.polygon([(x, -0.05), (x - 0.4, 0.9), (x + 0.4, 0.9)], p.light, 60)
    c.box(0, 0.86, 1, 1, p.ink)
    pose = "aim" if c.chance(0.4) else "stand"
    mirrored = c.chance(0.5)
    person(
        c, x, 0.9, c.between(0.45, 0.6), p.ink, pose=pose, coat=True, hat=True, mirrored=mirrored
    )
    if c.chance(0.6):
        at = c.between(0.05, 0.85)
        c.polygon([(at, 0), (at + 0.1, 0), (at - 0.05, 1), (at - 0.15, 1)], p.accent)
    else:
        for y in np.arange(0.05, 0.8, 0.07):
            c.polygon([(0, y), (1, y + 0.05), (1, y + 0.075), (0, y + 0.025)], p.ink, 190)


def fantasy(c: Canvas) -> None:
    """A castle on a rock before an enormous moon, sparks in the air."""
    p = c.palette
    c.sky()
    x, y = c.between(0.25, 0.75), c.between(0.22, 0.36)
    c.glow(x, y, 0.65, p.light, 0.6)
    c.disc(x, y, c.between(0.2, 0.28), mix(p.light, p.sky, 0.12))
    c.ridge(0.74, 0.16, mix(p.ground, p.ink, 0.5), 4)
    left = c.between(0.2, 0.5)
    for i in range(c.count(3, 5)):
        at, tall = left + 0.085 * i, c.between(0.14, 0.34)
        c.box(at, 0.72 - tall, at + 0.06, 0.8, p.ink)
        tip = (at + 0.03, 0.66 - tall)
        c.polygon([(at - 0.015, 0.72 - tall), tip, (at + 0.075, 0.72 - tall)], p.ink)
    c.hill(0.8, 0.03, p.ink)
    for _ in range(c.count(20, 40)):
        sx, sy = c.between(0, 1), c.between(0, 0.9)
        star(c, sx, sy, c.between(0.006, 0.022), p.accent, 4)


def horror(c: Canvas) -> None:
    """A dead tree or eyes in the dark, scratches, something dripping from above."""
    p = c.palette
    c.sky(p.sky, p.ground)
    c.glow(c.between(0.2, 0.8), c.between(0.4, 0.7), 0.6, mix(p.ground, p.accent, 0.5), 0.7)
    if c.chance(0.6):
        tree(c, c.between(0.25, 0.75), 0.92, c.between(0.6, 0.8), p.ink)
        person(c, c.between(0.2, 0.8), 0.9, c.between(0.16, 0.3), p.ink, coat=True)
    for _ in range(c.count(1, 4)):
        x, y, r = c.between(0.1, 0.8), c.between(0.25, 0.8), c.between(0.02, 0.05)
        for side in (0, 3 * r):
            c.disc(x + side, y, r, p.light if c.chance(0.5) else p.accent, squash=0.55)
            c.disc(x + side, y, 0.3 * r, BLACK)
    if c.chance(0.5):
        for x in np.arange(0, 1, 0.07):
            c.limb([(x, -0.05), (x, c.between(0.02, 0.22))], p.accent, c.between(0.03, 0.075))
    else:
        x, y = c.between(0.2, 0.5), c.between(0.15, 0.4)
        for i in range(4):
            start = (x + 0.08 * i, y)
            c.polygon([start, (x + 0.3 + 0.08 * i, y + 0.3), (x + 0.025 + 0.08 * i, y)], p.accent)


def mystery(c: Canvas) -> None:
    """A lit door or keyhole in the fog."""
    p = c.palette
    c.sky()
    x = c.between(0.3, 0.7)
    if c.chance(0.5):
        y = c.between(0.3, 0.45)
        c.glow(x, y, 0.7, mix(p.light, p.ground, 0.4), 0.8)
        c.disc(x, y, 0.13, p.accent)
        c.polygon(
            [(x - 0.06, y), (x + 0.06, y), (x + 0.13, y + 0.28), (x - 0.13, y + 0.28)], p.accent
        )
        person(c, x, y + 0.27, 0.2, p.ink, coat=True, hat=c.chance(0.5))
    else:
        c.glow(x, 0.55, 0.6, p.light, 0.7)
        c.box(x - 0.12, 0.32, x + 0.12, 0.74, p.accent)
        c.polygon([(x - 0.12, 0.74), (x + 0.12, 0.74), (x + 0.4, 1), (x - 0.4, 1)], p.accent, 110)
        person(c, x + c.between(-0.1, 0.1), 0.8, 0.36, p.ink, coat=True)
    for _ in range(7):
        y, r = c.between(0.5, 1), c.between(0.3, 0.6)
        c.disc(c.between(0, 1), y, r, mix(p.ground, p.light, 0.3), 45, squash=0.2)


def sci_fi(c: Canvas) -> None:
    """Stars, a ringed planet, a craft, a grid running to the horizon."""
    p = c.palette
    c.sky()
    for _ in range(60):
        c.disc(c.between(0, 1), c.between(0, 0.8), c.between(0.002, 0.006), p.light)
    x, y, r = c.between(0.2, 0.8), c.between(0.2, 0.45), c.between(0.14, 0.3)
    c.glow(x, y, 1.7 * r, p.accent, 0.5)
    c.disc(x, y, r, mix(p.ground, p.accent, 0.35))
    c.disc(x - 0.12 * r, y - 0.08 * r, 0.82 * r, mix(p.ground, p.accent, 0.6), 120)
    if c.chance(0.6):
        c.ring(x, y, 1.6 * r, p.light, 0.012, squash=0.22)
    if c.chance(0.6):
        for i in range(-8, 9):
            c.line([(0.5 + 0.04 * i, 0.74), (0.5 + 0.3 * i, 1.0)], p.accent, 0.004)
        for depth in (0.74, 0.76, 0.79, 0.83, 0.89, 0.97):
            c.line([(0, depth), (1, depth)], p.accent, 0.004)
    else:
        c.ridge(0.84, 0.12, p.ink, 5)
        person(c, c.between(0.3, 0.7), 0.84, 0.2, p.ink)
    x, y = c.between(0.15, 0.7), c.between(0.5, 0.66)
    c.polygon([(x, y), (x + 0.22, y - 0.03), (x + 0.16, y + 0.012), (x + 0.06, y + 0.03)], p.light)
    c.glow(x, y, 0.08, p.accent)


def thriller(c: Canvas) -> None:
    """A cross-hair, slashes or tunnels of rings closing on a figure."""
    p = c.palette
    c.sky()
    x, y = c.between(0.3, 0.7), c.between(0.3, 0.5)
    if c.chance(0.5):
        for i in range(7, 0, -1):
            shade = p.ink if i % 2 else mix(p.ground, p.light, 0.08 * (7 - i))
            c.disc(x, y, 0.11 * i, shade, 220)
    else:
        for _ in range(c.count(3, 6)):
            a, w = c.between(-0.4, 1), c.between(0.02, 0.12)
            c.polygon([(a, 0), (a + w, 0), (a + w + 0.5, 1), (a + 0.5, 1)], p.ink, 170)
    c.glow(x, y, 0.3, mix(p.accent, p.ground, 0.4), 0.6)
    person(c, x, y + 0.3, c.between(0.3, 0.42), p.ink, pose="run" if c.chance(0.5) else "stand")
    if c.chance(0.6):
        r = c.between(0.16, 0.28)
        c.ring(x, y, r, p.accent, 0.014)
        c.line([(x - 1.3 * r, y), (x + 1.3 * r, y)], p.accent, 0.008)
        c.line([(x, y - 0.9 * r), (x, y + 0.9 * r)], p.accent, 0.008)
    else:
        at = c.between(0.5, 0.7)
        c.polygon([(0, at), (1, at - 0.16), (1, at - 0.13), (0, at + 0.015)], p.accent)


def war(c: Canvas) -> None:
    """Soldiers on a ridge, smoke, aircraft, wire."""
    p = c.palette
    c.sky()
    c.glow(c.between(0.2, 0.8), 0.68, 0.5, p.accent, 0.8)
    for _ in range(c.count(4, 7)):
        x, y, r = c.between(0, 1), c.between(0.2, 0.65), c.between(0.1, 0.24)
        c.disc(x, y, r, mix(p.sky, p.ink, c.between(0.2, 0.6)), 80)
    for _ in range(c.count(1, 3)):
        x, y, s = c.between(0.1, 0.8), c.between(0.06, 0.3), c.between(0.08, 0.16)
        c.polygon([(x - s, y), (x + s, y - 0.008), (x + s, y + 0.008)], p.ink)
        c.polygon([(x - 0.2 * s, y), (x + 0.5 * s, y - 0.04), (x + 0.4 * s, y + 0.04)], p.ink)
    c.hill(0.84, 0.025, p.ink)
    num = c.count(2, 5)
    for i in range(num):
        pose = "aim" if c.chance(0.5) else "run"
        person(c, (i + 0.6) / num, 0.86, c.between(0.2, 0.34), p.ink, pose=pose, hat=True)
    for x in np.arange(0, 1, 0.12):
        c.line([(x, 0.83), (x + 0.03, 0.93)], p.light, 0.006)
        c.line([(x + 0.03, 0.83), (x, 0.93)], p.light, 0.006)


def western(c: Canvas) -> None:
    """Table mountains before a low sun, cacti, a man with a hat."""
    p = c.palette
    c.sky()
    c.disc(c.between(0.2, 0.8), c.between(0.38, 0.56), c.between(0.18, 0.3), p.light)
    for _ in range(c.count(1, 3)):
        x, y, w = c.between(-0.1, 0.8), c.between(0.45, 0.6), c.between(0.16, 0.4)
        rock = mix(p.ground, p.ink, 0.35)
        c.polygon([(x, y), (x + w, y), (x + 1.25 * w, 0.76), (x - 0.25 * w, 0.76)], rock)
    c.hill(0.74, 0.015, mix(p.ground, p.ink, 0.15))
    for _ in range(c.count(1, 3)):
        x, y, s = c.between(0.06, 0.94), c.between(0.76, 0.9), c.between(0.1, 0.2)
        c.limb([(x, y), (x, y - 1.1 * s)], p.ink, 0.3 * s)
        for side in (-1, 1):
            elbow = [(x, y - 0.4 * s), (x + 0.4 * side * s, y - 0.45 * s)]
            c.limb([*elbow, (x + 0.4 * side * s, y - 0.8 * s)], p.ink, 0.2 * s)
    x, tall = c.between(0.3, 0.7), c.between(0.34, 0.5)
    person(c, x, 0.92, tall, p.ink, coat=c.chance(0.5), hat=True, mirrored=c.chance(0.5))
