"""Small parametric objects that the project makes itself, so that everything runs where there is no asset library."""

from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path

import numpy as np

from raydream.assets.asset import Asset
from raydream.assets.libraries import AssetRecord
from raydream.assets.parts import Material, Part, build_asset, linear_from_srgb

PROCEDURAL = "procedural"
NUM_VARIANTS = 12
PALETTE = {
    "red": (0.84, 0.19, 0.16),
    "blue": (0.18, 0.38, 0.80),
    "yellow": (0.96, 0.77, 0.19),
    "green": (0.24, 0.60, 0.28),
    "purple": (0.52, 0.30, 0.70),
    "white": (0.93, 0.92, 0.89),
    "orange": (0.95, 0.50, 0.14),
    "black": (0.13, 0.13, 0.15),
    "pink": (0.95, 0.55, 0.67),
    "teal": (0.13, 0.62, 0.62),
    "brown": (0.50, 0.31, 0.18),
    "grey": (0.56, 0.58, 0.61),
}
WOOD, DARK_WOOD, METAL, GLASS, RUBBER, CREAM = "#b98a56", "#6b4529", "#a9adb3", "#a8d3e6", "#232428", "#efe6d2"
Number = float | int
Point = tuple[Number, Number, Number]


class _Builder:
    """Collects coloured primitives; +y is up and +z the front."""

    def __init__(self) -> None:
        self.parts: list[Part] = []

    def add(self, points: np.ndarray, triangles: np.ndarray, normals: np.ndarray, color: str) -> None:
        rgb = PALETTE.get(color) or [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        factor = np.append(linear_from_srgb(np.array(rgb)), 1.0)
        self.parts.append(Part(points, triangles, Material(factor), normals))

    def block(self, size: Point, centre: Point, color: str, rounding: Number = 0.3, tilt_deg: Number = 0.0) -> None:
        """A box with rounded edges; ``rounding`` in units of half the shortest side; tilted about the x axis."""
        half = np.array(size) / 2
        radius = rounding * half.min()
        points, triangles, normals = _rounded_cube(half, radius)
        sin, cos = np.sin(np.radians(tilt_deg)), np.cos(np.radians(tilt_deg))
        turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
        self.add(points @ turn.T + centre, triangles, normals @ turn.T, color)

    def turned(
        self, profile: list[tuple[Number, Number]], centre: Point, color: str, axis: int = 1, sides: int = 24
    ) -> None:
        """A solid of revolution of (radius, height) pairs about an axis; edges of the profile stay sharp."""
        points, triangles, normals = _lathe(np.array(profile), sides)
        order = {0: [1, 2, 0], 1: [0, 1, 2], 2: [2, 0, 1]}[axis]
        self.add(points[:, order] + centre, triangles, normals[:, order], color)

    def facets(self, points: np.ndarray, faces: str, color: str) -> None:
        """Flat triangles given by the digits of their corners, as in "012 023"."""
        corners = points[[[int(digit) for digit in face] for face in faces.split()]]
        normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        triangles = np.arange(3 * len(corners)).reshape(-1, 3)
        self.add(corners.reshape(-1, 3), triangles, np.repeat(normals, 3, axis=0), color)

    def ball(self, radii: Point, centre: Point, color: str) -> None:
        sides = 24 if max(radii) > 0.2 else 12
        angles = np.linspace(-np.pi / 2, np.pi / 2, sides // 2 + 1)
        points, triangles, _ = _lathe(np.stack([np.cos(angles), np.sin(angles)], axis=1), sides)
        self.add(points * radii + centre, triangles, points / radii, color)

    def rod(self, start: Point, end: Point, radius: Number, color: str, end_radius: Number | None = None) -> None:
        """A round bar between two points."""
        along = np.subtract(end, start)
        length = float(np.linalg.norm(along))
        top = radius if end_radius is None else end_radius
        points, triangles, normals = _lathe(np.array([(0, 0), (radius, 0), (top, length), (0, length)]), 12)
        y = along / length
        x = np.cross(y, [0.0, 0.0, 1.0] if abs(y[2]) < 0.9 else [1.0, 0.0, 0.0])
        x /= np.linalg.norm(x)
        turn = np.stack([x, y, np.cross(x, y)])
        self.add(points @ turn + start, triangles, normals @ turn, color)


def _rounded_cube(half: np.ndarray, radius: Number) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A box whose edges are one strip of quads with normals that turn smoothly across it: 108 triangles."""
    side, slope = np.array([-1.0, -1.0, 1.0, 1.0]), np.array([-1.0, 0.0, 0.0, 1.0])
    i, j = (grid.ravel() for grid in np.meshgrid(range(4), range(4), indexing="ij"))
    first = np.flatnonzero((i < 3) & (j < 3))
    halves = ([first, first + 4, first + 5], [first, first + 5, first + 1])
    square = np.concatenate([np.stack(half, axis=1) for half in halves])
    points: list[np.ndarray] = []
    triangles, normals = [], []
    for axis, sign in product(range(3), (-1.0, 1.0)):
        corner, direction = np.empty((16, 3)), np.empty((16, 3))
        for column, (of_corner, of_direction) in enumerate([(sign, sign), (side[i], slope[i]), (side[j], slope[j])]):
            corner[:, (axis + column) % 3] = of_corner
            direction[:, (axis + column) % 3] = of_direction
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        triangles.append((square if sign > 0 else square[:, [0, 2, 1]]) + 16 * len(points))
        points.append(corner * (half - radius) + radius * direction)
        normals.append(direction)
    return np.concatenate(points), np.concatenate(triangles), np.concatenate(normals)


def _lathe(profile: np.ndarray, sides: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    angle = np.linspace(0, 2 * np.pi, sides + 1)
    ring = np.stack([np.sin(angle), np.cos(angle)], axis=1)
    points, triangles, normals = [], [], []
    for (r0, y0), (r1, y1) in pairwise(profile):
        for radius, height in ((r0, y0), (r1, y1)):
            points.append(np.stack([radius * ring[:, 0], np.full(sides + 1, height), radius * ring[:, 1]], axis=1))
        slope = np.array([y1 - y0, r0 - r1]) / max(np.hypot(y1 - y0, r0 - r1), 1e-9)
        normals += [np.stack([slope[0] * ring[:, 0], np.full(sides + 1, slope[1]), slope[0] * ring[:, 1]], axis=1)] * 2
        base = (len(points) - 2) * (sides + 1)
        low = base + np.arange(sides)
        high = low + sides + 1
        if r0 > 0:
            triangles.append(np.stack([low, low + 1, high + 1], axis=1))
        if r1 > 0:
            triangles.append(np.stack([low, high + 1, high], axis=1))
    return np.concatenate(points), np.concatenate(triangles), np.concatenate(normals)


def _chair(b: _Builder, variant: int, color: str) -> None:
    wide, tall = (0.9, 1.05, 0.8)[variant % 3], (0.95, 1.3, 0.7, 1.1)[variant % 4]
    frame = (WOOD, DARK_WOOD, METAL, RUBBER, CREAM)[variant % 5]
    b.block((wide, 0.14, 0.9), (0, 0.9, 0), color, 0.8)
    if variant % 4 == 3:  # an office chair on one foot
        b.rod((0, 0.1, 0), (0, 0.85, 0), 0.06, METAL)
        for angle in np.linspace(0, 2 * np.pi, 6)[:-1]:
            tip = (0.5 * np.sin(angle), 0.08, 0.5 * np.cos(angle))
            b.rod((0, 0.16, 0), tip, 0.05, RUBBER)
            b.ball((0.08, 0.08, 0.08), tip, RUBBER)
    else:
        for x, z in product((-1.0, 1.0), (-1.0, 1.0)):
            spread = 0.12 if variant % 4 == 1 else 0.0
            foot = (x * (wide / 2 - 0.08 + spread), 0, z * (0.37 + spread))
            b.rod((x * (wide / 2 - 0.08), 0.85, z * 0.37), foot, 0.055, frame)
    back_z, top = -0.4, 0.95 + tall
    match variant % 3:
        case 0:
            b.block((wide, tall * 0.85, 0.12), (0, 0.98 + tall / 2, back_z), color, 0.9, tilt_deg=-8)
        case 1:
            for x in np.linspace(-wide / 2 + 0.08, wide / 2 - 0.08, 5):
                b.rod((x, 0.95, back_z), (x, top, back_z - 0.1), 0.04, frame)
            b.block((wide, 0.18, 0.1), (0, top, back_z - 0.1), color, 0.6)
        case _:
            for x in (-wide / 2 + 0.06, wide / 2 - 0.06):
                b.rod((x, 0.95, back_z), (x, top, back_z), 0.05, frame)
            for height in (0.35, 0.65, 0.95):
                b.block((wide - 0.06, 0.17, 0.07), (0, 0.95 + tall * height, back_z), color, 0.5)
    if variant % 5 in (1, 4):
        for x in (-1.0, 1.0):
            b.block((0.1, 0.08, 0.8), (x * wide / 2, 1.3, -0.02), frame, 0.6)
            b.rod((x * wide / 2, 0.9, 0.3), (x * wide / 2, 1.3, 0.3), 0.045, frame)


def _table(b: _Builder, variant: int, color: str) -> None:
    wide, deep, tall = (1.8, 1.3, 2.2)[variant % 3], (1.0, 1.2)[variant % 2], (0.9, 1.1, 0.6, 1.0)[variant % 4]
    leg = (WOOD, DARK_WOOD, METAL, RUBBER)[variant % 4]
    if variant % 3 == 1:
        b.turned([(0, 0), (0.75, 0), (0.8, 0.05), (0.75, 0.1), (0, 0.1)], (0, tall, 0), color, sides=36)
        b.turned([(0, 0), (0.45, 0), (0.42, 0.06), (0.1, 0.14), (0.08, tall)], (0, 0, 0), leg)
        return
    b.block((wide, 0.12, deep), (0, tall, 0), color, 0.5)
    for x, z in product((-1.0, 1.0), (-1.0, 1.0)):
        foot = (x * (wide / 2 - 0.1), 0, z * (deep / 2 - 0.1))
        b.rod(foot, (foot[0] * 0.95, tall, foot[2] * 0.95), 0.05, leg, end_radius=0.08)
    if variant % 2:
        b.block((wide * 0.85, 0.07, deep * 0.8), (0, tall * 0.35, 0), leg, 0.4)
    else:
        b.block((wide * 0.8, 0.2, deep * 0.85), (0, tall - 0.14, 0), leg, 0.3)
    if variant % 4 == 0:
        b.turned([(0, 0), (0.12, 0), (0.17, 0.2), (0.1, 0.34), (0.13, 0.4), (0, 0.4)], (0.3, tall + 0.06, 0), CREAM)
        for x in (-0.08, 0.0, 0.08):
            b.ball((0.09, 0.12, 0.09), (0.3 + x, tall + 0.58, x / 2), "#4f9a4a")


def _lamp(b: _Builder, variant: int, color: str) -> None:
    tall = (1.2, 2.0, 0.9, 1.6)[variant % 4]
    stand = (METAL, WOOD, RUBBER, CREAM, DARK_WOOD)[variant % 5]
    b.turned([(0, 0), (0.36, 0), (0.36, 0.05), (0.1, 0.12), (0, 0.12)], (0, 0, 0), stand)
    match variant % 3:
        case 0:
            b.rod((0, 0.1, 0), (0, tall, 0), 0.045, stand)
        case 1:
            vase = [(0.08, 0.1), (0.28, tall * 0.3), (0.22, tall * 0.55), (0.06, tall * 0.8), (0.05, tall)]
            b.turned(vase, (0, 0, 0), stand)
        case _:
            b.rod((0, 0.1, 0), (0.0, tall * 0.55, -0.35), 0.05, stand)
            b.ball((0.08, 0.08, 0.08), (0, tall * 0.55, -0.35), METAL)
            b.rod((0, tall * 0.55, -0.35), (0, tall, 0), 0.05, stand)
    shades = (
        [(0.52, 0), (0.3, 0.55), (0.28, 0.55), (0.5, 0)],
        [(0.45, 0), (0.45, 0.5), (0.42, 0.5), (0.42, 0)],
        [(0.55 * np.cos(a), 0.55 * np.sin(a)) for a in np.linspace(0, np.pi / 2, 8)],
        [(0.2, 0), (0.5, 0.35), (0.2, 0.7), (0.18, 0.7), (0.46, 0.35), (0.18, 0.02)],
    )
    b.turned(shades[variant % 4], (0, tall - 0.1, 0), color, sides=32)
    b.ball((0.13, 0.16, 0.13), (0, tall + 0.08, 0), "#fff3c4")


def _mushroom(b: _Builder, variant: int, color: str) -> None:
    wide, cap_height = (0.8, 1.0, 0.6, 0.9)[variant % 4], (0.5, 0.75, 1.0)[variant % 3]
    stem, num_stems = (0.9, 0.6, 1.3)[(variant // 2) % 3], (1, 1, 3)[variant % 3]
    for index in range(num_stems):
        size = (1.0, 0.6, 0.45)[index]
        x, z = ((0, 0), (0.75, 0.25), (-0.55, 0.45))[index]
        bulge = [(0, 0), (0.3, 0.02), (0.34, 0.15), (0.2, 0.5), (0.22, 1.0)]
        b.turned([(r * size, y * stem * size) for r, y in bulge], (x, 0, z), CREAM)
        angles = np.linspace(0, np.pi / 2, 9)
        pointed = 1.4 if variant % 4 == 2 else 1.0
        dome = [(wide * size * np.cos(a) ** pointed, cap_height * size * np.sin(a)) for a in angles]
        base = stem * size * 0.92
        b.turned([(0.18 * size, 0.08 * size), (wide * size, 0.0), *dome[1:]], (x, base, z), color, sides=32)
        if variant % 2 == 0:
            for spot in range(9):
                turn, lift = spot * 2.4, 0.35 + 0.95 * ((spot * 0.618) % 1)
                radius = wide * size * np.cos(lift) ** pointed
                place = (x + radius * np.sin(turn), base + cap_height * size * np.sin(lift), z + radius * np.cos(turn))
                b.ball((0.1 * size, 0.07 * size, 0.1 * size), place, "white" if color != "white" else "red")


def _car(b: _Builder, variant: int, color: str) -> None:
    long, tall = (2.6, 2.2, 3.0)[variant % 3], (0.5, 0.6, 0.42, 0.7)[variant % 4]
    wheel = (0.32, 0.38, 0.29)[variant % 3]
    trim = ("white", "black", METAL, CREAM)[variant % 4]
    b.block((1.2, tall, long), (0, wheel + tall / 2, 0), color, 0.5)
    cabin_long, cabin_z = ((0.55, -0.05), (0.75, -0.1), (0.32, 0.15), (0.45, -0.2))[variant % 4]
    roof = wheel + tall
    b.block((1.04, 0.42, long * cabin_long), (0, roof + 0.18, long * cabin_z), GLASS, 0.5)
    roof_color = color if variant % 2 else trim
    b.block((1.08, 0.12, long * cabin_long * 0.9), (0, roof + 0.42, long * cabin_z), roof_color, 0.9)
    if variant % 4 == 2:  # a pickup's open bed
        b.block((1.0, 0.08, long * 0.4), (0, roof + 0.01, -long * 0.26), RUBBER, 0.2)
    if variant % 5 == 0:
        b.block((0.16, 0.02, long * 0.99), (0.2, roof + 0.0, 0), trim, 0.2)
        b.block((0.16, 0.02, long * 0.99), (-0.2, roof + 0.0, 0), trim, 0.2)
    for x, z in product((-1.0, 1.0), (-1.0, 1.0)):
        tyre = [(0, -0.12), (wheel, -0.12), (wheel, 0.12), (0, 0.12)]
        b.turned(tyre, (x * 0.56, wheel, z * long * 0.31), RUBBER, axis=0)
        hub = [(0, -0.14), (wheel * 0.55, -0.14), (wheel * 0.55, 0.14), (0, 0.14)]
        b.turned(hub, (x * 0.56, wheel, z * long * 0.31), METAL, axis=0, sides=12)
    for x in (-0.4, 0.4):
        b.ball((0.12, 0.12, 0.05), (x, wheel + tall * 0.6, long / 2), "#fff3b0")
        b.block((0.2, 0.1, 0.05), (x, wheel + tall * 0.6, -long / 2), "#c62828", 0.3)
    b.block((1.1, 0.1, 0.08), (0, wheel + 0.1, long / 2), trim, 0.5)
    b.block((1.1, 0.1, 0.08), (0, wheel + 0.1, -long / 2), trim, 0.5)


def _tree(b: _Builder, variant: int, color: str) -> None:
    trunk = (DARK_WOOD, WOOD, "#8a6a52", CREAM)[variant % 4]
    tall = (1.0, 0.7, 1.3)[variant % 3]
    b.rod((0, 0, 0), (0, tall + 0.3, 0), 0.17, trunk, end_radius=0.09)
    match variant % 4:
        case 0:
            for level in range(4):
                radius = 0.95 - 0.2 * level
                cone = [(0, 0), (radius, 0.05), (radius * 0.3, 0.5), (0, 0.75)]
                b.turned(cone, (0, tall * 0.5 + 0.42 * level, 0), color)
        case 1:
            b.ball((0.85, 0.8, 0.85), (0, tall + 0.7, 0), color)
        case 2:
            crowns = [(0, 0.9, 0, 0.6), (0.5, 0.5, 0.2, 0.48), (-0.5, 0.45, 0.1, 0.5)]
            for x, y, z, r in [*crowns, (0.05, 0.4, -0.5, 0.46), (0, 0.45, 0.5, 0.4)]:
                b.ball((r, r * 0.85, r), (x, tall + y, z), color)
                b.rod((0, tall * 0.7, 0), (x, tall + y, z), 0.05, trunk)
        case _:
            b.ball((0.5, 1.15, 0.5), (0, tall + 0.9, 0), color)
    if variant % 3 == 0:
        for index in range(8):
            turn, lift = index * 2.4, 0.5 + 0.09 * index
            reach = 0.62 - 0.035 * index
            place = (reach * np.sin(turn), tall + lift, reach * np.cos(turn))
            b.ball((0.09, 0.09, 0.09), place, "red" if color != "red" else "yellow")


def _house(b: _Builder, variant: int, color: str) -> None:
    wide, tall, deep = (1.6, 1.2, 2.0)[variant % 3], (1.0, 1.6, 0.8, 1.2)[variant % 4], (1.3, 1.5)[variant % 2]
    wall = (CREAM, "white", "#d9b48a", "#b7c4cf")[variant % 4]
    b.block((wide, tall, deep), (0, tall / 2, 0), wall, 0.04)
    rise = (0.7, 0.5, 1.0)[variant % 3]
    x, z = wide / 2 + 0.12, deep / 2 + 0.12
    eaves = [(-x, 0.0, -z), (x, 0.0, -z), (x, 0.0, z), (-x, 0.0, z)]
    if variant % 3 == 1:
        ridge, faces = [(0.0, rise, 0.0)], "041 142 243 340 012 023"
    else:
        ridge, faces = [(0.0, rise, -z), (0.0, rise, z)], "035 054 145 152 325 041 012 023"
    b.facets(np.array(eaves + ridge) + np.array([0, tall - 0.02, 0]), faces, color)
    b.block((0.3, 0.6, 0.06), (0 if variant % 2 else -wide * 0.22, 0.3, deep / 2), DARK_WOOD, 0.2)
    windows = (("z", 0.28), ("z", -0.28), ("x", 0.25), ("x", -0.25))
    for floor, (side, place) in product(range(1 + (tall > 1.3)), windows):
        height = 0.6 + 0.6 * floor
        if side == "z" and floor + (place > 0) > 0:
            b.block((0.3, 0.3, 0.05), (place * wide, height, deep / 2), GLASS, 0.2)
            b.block((0.3, 0.3, 0.05), (place * wide, height, -deep / 2), GLASS, 0.2)
        if side == "x":
            b.block((wide + 0.05, 0.3, 0.3), (0, height, place * deep), GLASS, 0.1)
    if variant % 2 == 0:
        b.block((0.2, 0.7, 0.2), (wide * 0.28, tall + rise * 0.6, -deep * 0.2), "#9c4a3c", 0.1)


def _rocket(b: _Builder, variant: int, color: str) -> None:
    tall, wide = (1.6, 2.2, 1.3, 1.9)[variant % 4], (0.38, 0.5, 0.45)[variant % 3]
    body = ("white", CREAM, METAL, "#3c4654")[variant % 4]
    b.turned([(wide * 0.75, 0.25), (wide, 0.7), (wide, tall)], (0, 0, 0), body, sides=32)
    nose = [(wide * np.cos(a), (0.7, 1.1)[variant % 2] * np.sin(a)) for a in np.linspace(0, np.pi / 2, 9)]
    b.turned(nose, (0, tall, 0), color, sides=32)
    b.turned([(0, 0.25), (wide * 0.55, 0.0), (wide * 0.75, 0.25)], (0, 0.05, 0), RUBBER)
    num_fins = (3, 4)[variant % 2]
    for index in range(num_fins):
        angle = 2 * np.pi * index / num_fins + (np.pi / 4 if num_fins == 4 else 0)
        out = np.array([np.sin(angle), 0, np.cos(angle)])
        tip, root, side = out * (wide + 0.45), out * wide * 0.8, np.cross([0, 1, 0], out) * 0.04
        sheet = np.stack([root, root, tip, tip]) + np.outer([0.9, 0.25, 0.0, 0.35], [0, 1, 0])
        b.facets(np.concatenate([sheet + side, sheet - side]), "012 023 465 476 037 074 215 256 326 367", color)
    b.ball((0.17, 0.17, 0.08), (0, tall * 0.78, wide), GLASS)
    if variant % 3 != 1:
        b.turned([(wide + 0.01, 0), (wide + 0.01, 0.14)], (0, tall - 0.2, 0), color, sides=32)
    if variant % 3 == 2:
        for x in (-1.0, 1.0):
            b.turned([(0, 0), (0.14, 0.05), (0.14, 0.7), (0, 0.95)], (x * (wide + 0.12), 0.35, 0), color)


MAKERS: dict[str, Callable[[_Builder, int, str], None]] = {
    maker.__name__[1:]: maker for maker in (_car, _chair, _house, _lamp, _mushroom, _rocket, _table, _tree)
}


def procedural_asset(noun: str, variant: int) -> Asset:
    """Variant ``0 <= variant < NUM_VARIANTS`` of an object, always the same; each has its own colour."""
    builder = _Builder()
    MAKERS[noun](builder, variant, _variant_color(noun, variant))
    return build_asset(f"procedural-{noun}-{variant:02d}", procedural_caption(noun, variant), builder.parts, [])


def procedural_caption(noun: str, variant: int) -> str:
    """What ``procedural_asset`` makes, in words."""
    color = _variant_color(noun, variant)
    return f"{'an' if color[0] in 'aeiou' else 'a'} {color} {noun}"


def procedural_records() -> list[AssetRecord]:
    """All that ``procedural_asset`` can make, as records whose path is ``procedural/noun/variant``."""
    return [
        AssetRecord(
            f"{noun}-{variant}", Path(PROCEDURAL, noun, str(variant)), (procedural_caption(noun, variant),),
            nouns=(noun,), licence="CC0-1.0", front_axis="+Z",
        )
        for noun in MAKERS
        for variant in range(NUM_VARIANTS)
    ]  # fmt: skip


def _variant_color(noun: str, variant: int) -> str:
    names = list(PALETTE)
    shift = 3 * (list(MAKERS).index(noun) % 4)  # so that not every noun starts with the same colour
    return names[(variant + shift) % len(names)]
