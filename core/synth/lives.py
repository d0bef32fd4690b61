"""Scenes of genres about people's lives: faces, families, stages, sheets of paper.

One function a genre; see `core.synth.scenes` for the rules they share.
"""

from __future__ import annotations

import numpy as np

from .canvas import BLACK, WHITE, Canvas, mix
from .figures import bust, face, heart, person, skyline, star, tree


def animation(c: Canvas) -> None:
    """Round creatures with large eyes on a bright hill."""
    p = c.palette
    c.sky(p.sky, mix(p.sky, WHITE, 0.5))
    for _ in range(c.count(2, 4)):
        x, y, r = c.between(0, 1), c.between(0.05, 0.3), c.between(0.06, 0.12)
        for dx in (-0.8, 0, 0.8):
            c.disc(x + dx * r, y, r * (1 if dx == 0 else 0.7), WHITE, 220)
    c.hill(0.7, 0.05, p.ground)
    colours = [p.accent, p.light, mix(p.accent, p.sky, 0.4), mix(p.light, p.ground, 0.5)]
    for i in range(c.count(2, 4)):
        x, y, r = c.between(0.15, 0.85), c.between(0.5, 0.78), c.between(0.13, 0.22)
        colour = colours[i % 4]
        for side in (-1, 1):
            c.disc(x + side * 0.7 * r, y - 0.75 * r, 0.35 * r, colour)
        c.disc(x, y, r, colour, squash=c.between(0.9, 1.25))
        for side in (-1, 1):
            c.disc(x + side * 0.38 * r, y - 0.15 * r, 0.33 * r, WHITE)
            c.disc(x + side * 0.34 * r, y - 0.12 * r, 0.15 * r, p.ink)
        c.pie(x, y + 0.2 * r, 0.4 * r, 10, 170, p.ink)


def biography(c: Canvas) -> None:
    """One large face, seen from the side or the front, on an old photograph's tones."""
    p = c.palette
    c.sky()
    c.glow(0.5, 0.4, 0.8, p.light, 0.7)
    if c.chance(0.5):
        face(c, c.between(-0.05, 0.15), c.between(0.12, 0.22), 0.9, p.ink, mirrored=c.chance(0.5))
    else:
        bust(
            c,
            c.between(0.4, 0.6),
            c.between(0.36, 0.45),
            c.between(0.8, 1.05),
            mix(p.light, p.sky, 0.5),
            p.ink,
        )
    for i in range(c.count(0, 3)):
        c.line([(0.06, 0.08 + 0.02 * i), (c.between(0.3, 0.6), 0.08 + 0.02 * i)], p.accent, 0.006)


def comedy(c: Canvas) -> None:
    """People in odd poses before a plain bright ground."""
    p = c.palette
    c.sky(p.sky, p.sky if c.chance(0.5) else p.ground)
    if c.chance(0.5):
        c.rays(0.5, 0.55, 12, p.ground, 150, c.between(0, 1))
    else:
        c.disc(c.between(0.3, 0.7), c.between(0.4, 0.6), c.between(0.32, 0.46), p.ground)
    num = c.count(2, 4)
    for i in range(num):
        x = (i + 0.5) / num + c.between(-0.06, 0.06)
        colour = (p.ink, p.accent, mix(p.ink, p.ground, 0.35), mix(p.accent, p.ink, 0.5))[i % 4]
        pose = ("dance", "stand", "run")[c.count(0, 2)]
        tall, skirt, mirrored = c.between(0.34, 0.5), c.chance(0.35), c.chance(0.5)
        person(c, x, c.between(0.8, 0.88), tall, colour, pose=pose, skirt=skirt, mirrored=mirrored)


def documentary(c: Canvas) -> None:
    """Photographs pinned on paper, much of it left empty."""
    p = c.palette
    c.sky(p.sky, mix(p.sky, p.ground, 0.4))
    columns, rows = (c.count(1, 3), c.count(1, 3))
    top, tall = c.between(0.1, 0.22), c.between(0.4, 0.52)
    for i in range(columns):
        for j in range(rows):
            x0, x1 = 0.1 + 0.8 * i / columns, 0.1 + 0.8 * (i + 1) / columns - 0.03
            y0, y1 = top + tall * j / rows, top + tall * (j + 1) / rows - 0.02
            c.box(x0, y0, x1, y1, mix(p.ground, p.ink, c.between(0.2, 0.7)))
            c.glow(
                (x0 + x1) / 2, (y0 + y1) / 2, 0.2 * (x1 - x0) + 0.1, p.light, c.between(0.2, 0.6)
            )
            if c.chance(0.6):
                person(c, (x0 + x1) / 2, y1, 0.8 * (y1 - y0), p.ink)
            else:
                c.polygon([(x0, y1), (x0, y1 - 0.04), ((x0 + x1) / 2, y1 - 0.1), (x1, y1)], p.ink)
    c.box(0.1, top + tall + 0.03, c.between(0.3, 0.7), top + tall + 0.042, p.accent)


def drama(c: Canvas) -> None:
    """One person far away, or a face in half shadow, in wide washed-out places."""
    p = c.palette
    c.sky()
    for _ in range(c.count(0, 5)):
        x, y = c.between(0, 1), c.between(0.05, 0.5)
        c.disc(x, y, c.between(0.2, 0.6), p.light, c.count(20, 60), squash=c.between(0.08, 0.3))
    (_far_away, _at_the_window, _on_the_road, _portrait, _double_exposure)[c.count(0, 4)](c)


def _far_away(c: Canvas) -> None:
    p, horizon = c.palette, c.between(0.5, 0.8)
    c.disc(c.between(0.15, 0.85), horizon - c.between(0, 0.4), c.between(0.06, 0.16), p.light, 170)
    c.hill(horizon, c.between(0, 0.05), mix(p.ground, p.ink, 0.5))
    if c.chance(0.4):
        tree(c, c.between(0.1, 0.9), horizon + 0.04, c.between(0.3, 0.5), mix(p.ink, p.ground, 0.3))
    x, tall = c.between(0.2, 0.8), c.between(0.12, 0.34)
    c.polygon([(x, horizon + 0.04), (x + 0.05, horizon + 0.04), (x + 0.3, 1)], p.ink, 120)
    person(c, x, horizon + 0.04, tall, p.ink, coat=c.chance(0.5), skirt=c.chance(0.3))


def _at_the_window(c: Canvas) -> None:
    p = c.palette
    c.box(0, 0, 1, 1, p.ink, 150)
    x0, x1 = c.between(0.08, 0.35), c.between(0.6, 0.92)
    y0, y1 = c.between(0.1, 0.25), c.between(0.6, 0.74)
    c.box(x0, y0, x1, y1, mix(p.sky, p.light, 0.6))
    for at in np.linspace(x0, x1, c.count(2, 4)):
        c.box(at - 0.012, y0, at + 0.012, y1, p.ink)
    cross = c.between(y0 + 0.1, y1 - 0.2)
    c.box(x0, cross, x1, cross + 0.012, p.ink)
    c.polygon([(x0, y1), (x1, y1), (x1 + 0.15, 1), (x0 + 0.05, 1)], p.light, 50)
    person(c, c.between(x0 + 0.1, x1 - 0.1), y1 + 0.14, c.between(0.4, 0.55), p.ink, coat=True)


def _on_the_road(c: Canvas) -> None:
    p, horizon, x = c.palette, c.between(0.42, 0.6), c.between(0.25, 0.75)
    c.ridge(horizon, c.between(0.05, 0.14), mix(p.ground, p.light, 0.25), c.count(3, 7))
    c.box(0, horizon, 1, 1, mix(p.ground, p.ink, 0.35))
    c.polygon([(x, horizon), (x + 0.45, 1), (x - 0.45, 1)], mix(p.ink, p.ground, 0.2))
    for near in (0.12, 0.3, 0.55, 0.9):
        y, wide = horizon + (1 - horizon) * near, 0.012 * near + 0.002
        c.box(x - wide, y, x + wide, y + 0.05 * near, p.light)
    side = -1 if c.chance(0.5) else 1
    for near in (0.15, 0.32, 0.6, 1.0):
        at, foot = x + side * 0.6 * near, horizon + (1 - horizon) * near * 0.5
        c.line([(at, foot), (at, foot - 0.5 * near)], p.ink, 0.014 * near + 0.002)
    person(
        c,
        x - side * 0.1,
        0.8,
        c.between(0.2, 0.34),
        p.ink,
        pose="run" if c.chance(0.4) else "stand",
    )


def _portrait(c: Canvas) -> None:
    p = c.palette
    x, y, wide = c.between(0.25, 0.75), c.between(0.3, 0.48), c.between(0.7, 1.15)
    bust(c, x, y, wide, mix(p.accent, p.sky, 0.4), p.ink)


def _double_exposure(c: Canvas) -> None:
    p, left = c.palette, c.chance(0.5)
    x, y, wide = c.between(-0.1, 0.3), c.between(0.08, 0.3), c.between(0.65, 1.0)
    face(c, x, y, wide, p.ink, mirrored=left, alpha=225)
    base = c.between(0.78, 0.9)
    if c.chance(0.5):
        skyline(c, base, c.between(0.1, 0.3), mix(p.ground, p.light, 0.3), None)
    else:
        c.ridge(base, c.between(0.08, 0.25), mix(p.ground, p.light, 0.3), c.count(3, 7))


def family(c: Canvas) -> None:
    """A house, hills, a sun and people of all sizes hand in hand."""
    p = c.palette
    c.sky(p.sky, p.light)
    c.disc(c.between(0.12, 0.88), c.between(0.1, 0.2), c.between(0.09, 0.14), (255, 221, 87))
    c.hill(0.64, 0.04, mix(p.ground, WHITE, 0.25))
    x, y, s = c.between(0.1, 0.6), c.between(0.44, 0.5), c.between(0.2, 0.32)
    c.box(x, y, x + s, y + 0.62 * s, p.light)
    c.polygon([(x - 0.04, y), (x + s / 2, y - 0.4 * s), (x + s + 0.04, y)], p.accent)
    c.box(x + 0.4 * s, y + 0.3 * s, x + 0.6 * s, y + 0.62 * s, p.ink)
    c.hill(0.74, 0.03, p.ground)
    start = c.between(0.15, 0.35)
    for i, tall in enumerate((0.3, 0.27, 0.18, 0.15)[: c.count(3, 4)]):
        colour = (p.ink, p.accent, mix(p.sky, p.ink, 0.4), p.ink)[i]
        person(c, start + 0.16 * i, 0.88, tall, colour, skirt=i == 1)


def history(c: Canvas) -> None:
    """Columns under a pediment, or an arch, drawn on parchment with a seal."""
    p = c.palette
    c.sky()
    c.glow(0.5, 0.4, 0.7, p.light, 0.6)
    num, top = c.count(4, 6), c.between(0.3, 0.4)
    left, right = c.between(0.06, 0.2), c.between(0.8, 0.94)
    c.polygon([(left - 0.04, top), (0.5, top - 0.14), (right + 0.04, top)], p.ink)
    c.box(left - 0.02, top + 0.005, right + 0.02, top + 0.04, mix(p.ink, p.ground, 0.4))
    for i in range(num):
        x = left + (right - left - 0.07) * i / (num - 1)
        c.box(x, top + 0.04, x + 0.07, 0.8, p.ink)
        c.box(x + 0.012, top + 0.04, x + 0.024, 0.8, mix(p.ink, p.light, 0.35))
    c.box(left - 0.05, 0.8, right + 0.05, 0.86, mix(p.ink, p.ground, 0.3))
    person(c, c.between(0.3, 0.7), 0.84, 0.3, p.accent, coat=True)
    c.disc(c.between(0.75, 0.9), c.between(0.1, 0.18), 0.07, p.accent)


def music(c: Canvas) -> None:
    """Stage lights over a crowd, a record, bars of sound."""
    p = c.palette
    c.sky()
    for i in range(c.count(3, 5)):
        x, lean = 0.1 + 0.2 * i, c.between(-0.4, 0.4)
        colour = (p.accent, p.light, p.ground)[i % 3]
        c.polygon([(x, -0.02), (x + lean - 0.14, 0.9), (x + lean + 0.14, 0.9)], colour, 90)
    if c.chance(0.5):
        x, y, r = c.between(0.3, 0.7), c.between(0.38, 0.5), c.between(0.28, 0.4)
        c.disc(x, y, r, p.ink)
        for share in (0.9, 0.75, 0.6):
            c.ring(x, y, share * r, mix(p.ink, WHITE, 0.25), 0.006)
        c.disc(x, y, 0.35 * r, p.accent)
        c.disc(x, y, 0.05 * r, p.light)
    else:
        x = c.between(0.3, 0.7)
        person(c, x, 0.8, c.between(0.4, 0.5), p.ink, pose="dance", mirrored=c.chance(0.5))
        c.line([(x - 0.2, 0.52), (x + 0.25, 0.62)], p.accent, 0.03)
    for i in range(18):
        c.box(i / 18, 0.9 - c.between(0.02, 0.14), i / 18 + 0.035, 1, p.ink if i % 2 else p.accent)


def musical(c: Canvas) -> None:
    """Curtains open on dancers in a spotlight."""
    p = c.palette
    c.sky(p.ink, p.sky)
    x = c.between(0.4, 0.6)
    c.polygon([(x, -0.05), (x - 0.36, 0.85), (x + 0.36, 0.85)], p.light, 120)
    c.disc(x, 0.85, 0.37, p.light, 200, squash=0.25)
    for i in range(c.count(1, 3)):
        tall, skirt = c.between(0.36, 0.48), i % 2 == 0
        person(
            c, x + 0.2 * (i - 0.6), 0.86, tall, p.ink, pose="dance", skirt=skirt, mirrored=i == 0
        )
    inner = c.between(0.16, 0.26)
    for i in range(5):
        colour = p.ground if i % 2 else mix(p.ground, BLACK, 0.3)
        a, b = inner * i / 5, inner * (i + 1) / 5
        c.polygon([(a, 0), (b, 0), (0.8 * b, 0.9), (0.8 * a, 0.9)], colour)
        c.polygon([(1 - a, 0), (1 - b, 0), (1 - 0.8 * b, 0.9), (1 - 0.8 * a, 0.9)], colour)
    for i in range(8):
        c.disc((i + 0.5) / 8, 0.0, 0.075, p.ground)
        star(c, (i + 0.5) / 8, 0.95, 0.03, p.accent)


def unknown(c: Canvas) -> None:
    """Nothing to go by: a grey sheet with an empty frame ("N/A")."""
    p = c.palette
    c.sky()
    x0, y0 = c.between(0.08, 0.35), c.between(0.08, 0.4)
    x1, y1 = c.between(0.6, 0.92), c.between(0.5, 0.75)
    c.box(x0, y0, x1, y1, p.accent)
    c.line([(x0, y0), (x1, y1)], p.ink, 0.008)
    if c.chance(0.7):
        c.line([(x0, y1), (x1, y0)], p.ink, 0.008)
    for _ in range(c.count(0, 4)):
        c.disc(c.between(0, 1), c.between(0, 1), c.between(0.05, 0.3), p.light, 60)


def news(c: Canvas) -> None:
    """A front page: columns of grey lines, a photograph, a red band."""
    p = c.palette
    c.sky(p.sky, p.ground)
    columns, photo = c.count(2, 4), c.count(0, 1)
    for i in range(columns):
        x0, x1 = 0.06 + 0.88 * i / columns, 0.06 + 0.88 * (i + 1) / columns - 0.03
        for y in np.arange(0.24, 0.86, 0.02):
            if c.chance(0.93):
                c.box(x0, y, x1 - c.between(0, 0.05), y + 0.008, mix(p.sky, p.ink, 0.55))
    y = c.between(0.28, 0.5)
    x = 0.06 if photo else c.between(0.3, 0.42)
    c.box(x, y, x + 0.5, y + 0.25, mix(p.ink, p.ground, 0.35))
    bust(c, x + c.between(0.18, 0.32), y + 0.11, 0.3, p.light, p.ink)
    c.box(x, y + 0.25, x + 0.5, y + 0.36, p.sky)
    band = c.between(0.06, 0.14)
    c.box(0, band, 1, band + c.between(0.06, 0.1), p.accent)


def reality_tv(c: Canvas) -> None:
    """A television set full of colour bars, stars around it."""
    p = c.palette
    c.sky()
    x0, y0, wide = c.between(0.08, 0.2), c.between(0.22, 0.34), c.between(0.64, 0.74)
    x1, y1 = x0 + wide, y0 + 0.34
    for side in (-0.2, 0.2):
        c.line([((x0 + x1) / 2, y0), ((x0 + x1) / 2 + side, y0 - 0.12)], p.ink, 0.014)
    c.box(x0, y0, x1, y1, p.ink)
    bars = (p.light, p.accent, p.sky, p.ground, (235, 60, 60), (60, 90, 220))
    for i, colour in enumerate(bars):
        step = (wide - 0.1) / len(bars)
        c.box(x0 + 0.05 + step * i, y0 + 0.03, x0 + 0.05 + step * (i + 1), y1 - 0.03, colour)
    for i in range(c.count(2, 3)):
        person(c, x0 + wide * (i + 1) / 4, y1 - 0.03, 0.24, p.ink, pose="dance", mirrored=i == 1)
    for _ in range(c.count(4, 8)):
        star(c, c.between(0.05, 0.95), c.between(0.03, 0.9), c.between(0.03, 0.06), p.accent)


def romance(c: Canvas) -> None:
    """Two faces close together or a couple at sunset, hearts."""
    p = c.palette
    c.sky()
    c.glow(0.5, c.between(0.3, 0.5), 0.75, p.light, 0.8)
    if c.chance(0.55):
        y, wide = c.between(0.16, 0.3), c.between(0.56, 0.68)
        face(c, 0.47 - 0.83 * wide, y, wide, p.ink)
        face(c, 0.53 - 0.17 * wide, y + c.between(-0.03, 0.03), wide, p.accent, mirrored=True)
    else:
        x, tall = c.between(0.35, 0.6), c.between(0.36, 0.48)
        heart(c, x + 0.05, 0.42, c.between(0.26, 0.36), p.accent, 150)
        person(c, x, 0.86, tall, p.ink)
        person(c, x + 0.13, 0.86, 0.92 * tall, p.ink, skirt=True)
        c.hill(0.88, 0.015, mix(p.ground, p.ink, 0.6))
    for _ in range(c.count(3, 9)):
        heart(c, c.between(0, 1), c.between(0.02, 0.5), c.between(0.015, 0.05), p.accent, 190)


def short(c: Canvas) -> None:
    """A few plain shapes on a nearly empty sheet."""
    p = c.palette
    c.sky()
    for i in range(c.count(1, 3)):
        x, y, r = c.between(0.15, 0.85), c.between(0.12, 0.65), c.between(0.08, 0.24)
        colour = (p.accent, p.ink, mix(p.accent, p.sky, 0.5))[i]
        if c.chance(0.6):
            c.disc(x, y, r, colour)
        else:
            c.polygon([(x, y), (x + 1.6 * r, y + 0.5 * r), (x + 0.4 * r, y + 1.1 * r)], colour)
    at = c.between(0.1, 0.9)
    c.line([(at, 0), (at + c.between(-0.3, 0.3), c.between(0.4, 0.9))], p.ink, 0.006)


def sport(c: Canvas) -> None:
    """Stripes of turf, a ball in flight, a player, a number."""
    p = c.palette
    c.sky()
    lean = c.between(-0.2, 0.2)
    for i in range(0, 8, 2):
        a, b = i / 8, (i + 1) / 8
        c.polygon([(a, 0.45), (b, 0.45), (b + lean, 1), (a + lean, 1)], mix(p.ground, WHITE, 0.18))
    c.ring(c.between(0.3, 0.7), 0.72, 0.3, p.accent, 0.012, squash=0.5)
    c.line([(0, c.between(0.45, 0.55)), (1, c.between(0.45, 0.55))], p.accent, 0.012)
    mirrored, tall = c.chance(0.5), c.between(0.42, 0.56)
    person(c, c.between(0.35, 0.65), 0.86, tall, p.ink, pose="run", mirrored=mirrored)
    x, y, r = c.between(0.12, 0.88), c.between(0.12, 0.32), c.between(0.07, 0.12)
    c.disc(x, y, r, p.light)
    c.ring(x, y, r, p.ink, 0.008)
    for turn in range(5):
        angle = 2 * np.pi * turn / 5 + lean
        tip = (x + r * np.cos(angle), y + r * np.sin(angle) * c.width / c.height)
        c.line([(x, y), (float(tip[0]), float(tip[1]))], p.ink, 0.006)
