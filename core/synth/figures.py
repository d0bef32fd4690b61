"""Silhouettes that several scenes share: people, faces, towers, trees, hearts, stars."""

from __future__ import annotations

import functools

import numpy as np

from .canvas import Canvas, Colour, Point, mix

# Joints of a figure 1 high, feet at y = 0, x to the right; each limb is a polyline.
_STAND = {
    "arms": [
        [(0.0, 0.80), (-0.11, 0.62), (-0.10, 0.44)],
        [(0.0, 0.80), (0.11, 0.62), (0.10, 0.44)],
    ],
    "legs": [
        [(-0.03, 0.48), (-0.06, 0.25), (-0.06, 0.0)],
        [(0.03, 0.48), (0.06, 0.25), (0.06, 0.0)],
    ],
}
_RUN = {
    "arms": [
        [(0.02, 0.80), (-0.16, 0.70), (-0.22, 0.54)],
        [(0.02, 0.80), (0.15, 0.62), (0.27, 0.72)],
    ],
    "legs": [
        [(-0.02, 0.48), (-0.13, 0.27), (-0.33, 0.20)],
        [(0.02, 0.48), (0.19, 0.36), (0.16, 0.0)],
    ],
}
_DANCE = {
    "arms": [
        [(0.0, 0.80), (-0.15, 0.86), (-0.20, 1.04)],
        [(0.0, 0.80), (0.16, 0.74), (0.27, 0.88)],
    ],
    "legs": [
        [(-0.02, 0.48), (-0.05, 0.24), (-0.02, 0.0)],
        [(0.02, 0.48), (0.20, 0.36), (0.26, 0.14)],
    ],
}
_AIM = {
    "arms": [[(0.0, 0.80), (0.14, 0.77), (0.32, 0.79)], [(0.0, 0.78), (0.12, 0.70), (0.30, 0.78)]],
    "legs": [
        [(-0.03, 0.48), (-0.13, 0.25), (-0.18, 0.0)],
        [(0.03, 0.48), (0.11, 0.26), (0.10, 0.0)],
    ],
}
POSES: dict[str, dict[str, list[list[Point]]]] = {
    "stand": _STAND,
    "run": _RUN,
    "dance": _DANCE,
    "aim": _AIM,
}

# A face looking right in a unit square, clockwise from the nape.
_PROFILE = (
    (-0.22, 1.42), (-0.15, 1.16), (0.16, 1.02), (0.25, 0.86),
    (0.19, 0.70), (0.11, 0.52), (0.11, 0.32), (0.22, 0.13), (0.42, 0.04),
    (0.61, 0.08), (0.71, 0.19), (0.735, 0.32), (0.725, 0.40), (0.77, 0.48), (0.835, 0.565),
    (0.815, 0.595), (0.755, 0.61), (0.765, 0.645), (0.79, 0.67), (0.765, 0.695), (0.785, 0.725),
    (0.755, 0.76), (0.765, 0.81), (0.735, 0.865), (0.66, 0.885), (0.57, 0.865), (0.53, 0.91),
    (0.58, 1.00), (0.74, 1.10), (0.86, 1.42),
)  # fmt: skip


def person(
    canvas: Canvas,
    x: float,
    foot: float,
    height: float,
    colour: Colour,
    *,
    pose: str = "stand",
    coat: bool = False,
    hat: bool = False,
    skirt: bool = False,
    mirrored: bool = False,
) -> None:
    """A figure standing at (x, foot), `height` a share of the canvas' height."""
    aspect = canvas.height / canvas.width
    side = -1 if mirrored else 1

    def place(joint: Point) -> Point:
        return x + side * joint[0] * height * aspect, foot - joint[1] * height

    thick = height * aspect
    limbs = POSES[pose]
    for leg in limbs["legs"]:
        canvas.limb([place(j) for j in leg], colour, 0.075 * thick)
    for arm in limbs["arms"]:
        canvas.limb([place(j) for j in arm], colour, 0.055 * thick)
    torso = [(-0.10, 0.80), (0.10, 0.80), (0.07, 0.46), (-0.07, 0.46)]
    if coat:
        torso = [(-0.105, 0.80), (0.105, 0.80), (0.15, 0.16), (-0.15, 0.16)]
    if skirt:
        torso = [
            (-0.08, 0.80),
            (0.08, 0.80),
            (0.05, 0.60),
            (0.19, 0.24),
            (-0.19, 0.24),
            (-0.05, 0.60),
        ]
    canvas.polygon([place(j) for j in torso], colour)
    canvas.limb([place((-0.07, 0.80)), place((0.07, 0.80))], colour, 0.075 * thick)
    head_x, head_y = place((0.015, 0.915))
    canvas.disc(head_x, head_y, 0.062 * thick, colour, squash=1.2)
    canvas.limb([place((0.0, 0.80)), place((0.01, 0.88))], colour, 0.06 * thick)
    if hat:
        brim = [place(j) for j in ((-0.14, 0.945), (0.16, 0.945), (0.16, 0.965), (-0.14, 0.965))]
        crown = [place(j) for j in ((-0.065, 0.95), (0.085, 0.95), (0.065, 1.03), (-0.045, 1.03))]
        canvas.polygon(brim, colour)
        canvas.polygon(crown, colour)


def face(
    canvas: Canvas,
    x: float,
    y: float,
    width: float,
    colour: Colour,
    *,
    mirrored: bool = False,
    alpha: int = 255,
) -> None:
    """A profile with neck, upper left corner of its square at (x, y), looking right."""
    height = width * canvas.width / canvas.height
    points = [
        (x + ((1 - px) if mirrored else px) * width, y + py * height)
        for px, py in _smooth_profile()
    ]
    canvas.polygon(points, colour, alpha)
    if alpha == 255 and canvas.chance(0.5):
        back = (1 - 0.12) if mirrored else 0.12
        canvas.disc(x + back * width, y + canvas.between(0.2, 0.5) * height, 0.16 * width, colour)


def bust(canvas: Canvas, x: float, y: float, width: float, colour: Colour, shade: Colour) -> None:
    """Head and shoulders from the front, half of the face lit; (x, y) is the face's centre and
    `width` the shoulders' in shares of the canvas' width."""
    tall = width * canvas.width / canvas.height
    canvas.disc(x, y + 0.95 * tall, 0.56 * width, shade, squash=0.95)
    canvas.box(x - 0.11 * width, y, x + 0.11 * width, y + 0.5 * tall, mix(colour, shade, 0.55))
    long_hair = canvas.chance(0.45)
    canvas.disc(x, y - 0.05 * tall, 0.29 * width, shade, squash=1.28)
    if long_hair:
        canvas.box(x - 0.29 * width, y - 0.05 * tall, x + 0.29 * width, y + 0.42 * tall, shade)
    angles = np.linspace(0, 2 * np.pi, 36)
    oval = [
        (x + 0.235 * width * float(np.sin(t)), y + 0.01 - 0.32 * tall * float(np.cos(t)))
        for t in angles
    ]
    canvas.polygon(oval, colour)
    canvas.polygon(oval[: len(oval) // 2 + 1], shade)
    parting = canvas.between(-0.15, 0.15) * width
    fringe = [(x - 0.25 * width, y - 0.02 * tall), (x - 0.22 * width, y - 0.3 * tall)]
    fringe += [(x + 0.2 * width, y - 0.3 * tall), (x + parting, y - 0.24 * tall)]
    canvas.polygon(fringe, shade)
    canvas.line(
        [(x - 0.15 * width, y - 0.03 * tall), (x - 0.06 * width, y - 0.03 * tall)],
        shade,
        0.03 * width,
    )


def skyline(
    canvas: Canvas, base: float, rise: float, colour: Colour, window: Colour | None
) -> None:
    """A row of towers on `base`, up to `rise` high, with lit windows if a colour is given."""
    x = -0.02
    while x < 1.0:
        wide = canvas.between(0.06, 0.15)
        top = base - rise * canvas.between(0.35, 1.0)
        canvas.box(x, top, x + wide, 1.02, colour)
        if window is not None:
            for row in np.arange(top + 0.015, base - 0.01, 0.026):
                for column in np.arange(x + 0.012, x + wide - 0.02, 0.028):
                    if canvas.chance(0.4):
                        canvas.box(column, row, column + 0.012, row + 0.010, window)
        x += wide + canvas.between(0.0, 0.015)


def tree(canvas: Canvas, x: float, foot: float, height: float, colour: Colour) -> None:
    """A bare tree: each branch forks into two shorter ones."""

    def grow(px: float, py: float, angle: float, length: float, depth: int) -> None:
        qx = px + length * float(np.sin(angle))
        qy = py - length * float(np.cos(angle)) * canvas.width / canvas.height
        canvas.limb([(px, py), (qx, qy)], colour, max(0.006, 0.12 * length))
        if depth:
            for side in (-1, 1):
                turn = side * canvas.between(0.25, 0.75)
                grow(qx, qy, angle + turn, length * canvas.between(0.6, 0.8), depth - 1)

    grow(x, foot, canvas.between(-0.1, 0.1), height * 0.4 * canvas.height / canvas.width, 4)


def heart(canvas: Canvas, x: float, y: float, r: float, colour: Colour, alpha: int = 255) -> None:
    """A heart of about 2r by 2r."""
    t = np.linspace(0, 2 * np.pi, 40)
    aspect = canvas.width / canvas.height
    xs = x + r * np.sin(t) ** 3
    ys = (
        y
        - r * aspect * (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    )
    canvas.polygon([(float(a), float(b)) for a, b in zip(xs, ys, strict=True)], colour, alpha)


def star(canvas: Canvas, x: float, y: float, r: float, colour: Colour, num_tips: int = 5) -> None:
    """A star with its first tip up."""
    angles = np.pi * np.arange(2 * num_tips) / num_tips
    reach = np.where(np.arange(2 * num_tips) % 2 == 0, r, 0.42 * r)
    aspect = canvas.width / canvas.height
    points = [
        (x + float(q * np.sin(a)), y - float(q * np.cos(a)) * aspect)
        for q, a in zip(reach, angles, strict=True)
    ]
    canvas.polygon(points, colour)


@functools.cache
def _smooth_profile() -> tuple[Point, ...]:
    """The profile's points joined by Catmull-Rom splines (closed), four pieces each."""
    points = np.array(_PROFILE)
    before, after = np.roll(points, 1, axis=0), np.roll(points, -1, axis=0)
    beyond = np.roll(points, -2, axis=0)
    pieces = []
    for t in (0.0, 0.25, 0.5, 0.75):
        pieces.append(
            0.5
            * (
                2 * points
                + (after - before) * t
                + (2 * before - 5 * points + 4 * after - beyond) * t**2
                + (3 * points - before - 3 * after + beyond) * t**3
            )
        )
    curve = np.stack(pieces, axis=1).reshape(-1, 2)
    return tuple((float(x), float(y)) for x, y in curve)
