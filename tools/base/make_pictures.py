"""Draws the pictures the vision tower of the tiny base learns from, with their captions as LLaVA records (template plain).

One shape a picture on a background of any brightness: flat, striped, graded or grainy; the shape is drawn as a signed
distance field with a soft edge, sometimes rotated, outlined or shaded, at any place.  That is a wider and different look
than easy-VQA's (flat color, axis-aligned, Pillow's drawing functions); nothing is taken from its files.
Usage: python make_pictures.py OUT_DIR [--lesson easy|varied|plain] [--count 12000] [--seed 2]    writes OUT_DIR/captions.json and OUT_DIR/images/*.png
"""

import argparse
import colorsys
import json
import os
import random

import numpy as np

import words

SIDE = 64
# Anchor colors (0-255); each drawn color is an anchor with a small shift.
ANCHORS = {
    "red": [(255, 0, 0), (225, 20, 25), (240, 40, 30)],
    "green": [(0, 255, 0), (0, 190, 0), (30, 160, 40)],
    "blue": [(0, 0, 255), (20, 40, 220), (40, 70, 240)],
    "yellow": [(255, 255, 0), (245, 225, 20), (235, 220, 60)],
    "black": [(0, 0, 0), (15, 15, 15), (25, 22, 25)],
    "gray": [(128, 128, 128), (145, 145, 145), (110, 112, 112)],
    "teal": [(0, 128, 128), (0, 140, 135), (10, 115, 120)],
    "brown": [(165, 42, 42), (139, 69, 19), (120, 62, 30)],
    "orange": [(255, 150, 0), (250, 130, 20)],
    "purple": [(128, 0, 160), (150, 40, 190)],
    "pink": [(255, 120, 190), (250, 90, 180)],
    "white": [(255, 255, 255), (248, 248, 248)],
}


def polygon(x, y, corners):
    """Distance to a polygon, negative inside (after Quilez, "2D distance functions")."""
    n = len(corners)
    d = np.full(x.shape, 1e9)
    inside = np.zeros(x.shape, bool)
    for i in range(n):
        (ax, ay), (bx, by) = corners[i], corners[(i + 1) % n]
        ex, ey = bx - ax, by - ay
        t = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey + 1e-9), 0, 1)
        d = np.minimum(d, np.hypot(x - ax - ex * t, y - ay - ey * t))
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ax + ex * (y - ay) / (by - ay))
    return np.where(inside, -d, d)


def around(count, radius, turn):
    angles = turn + 2 * np.pi * np.arange(count) / count
    return [(r * np.cos(a), r * np.sin(a)) for r, a in zip(np.broadcast_to(radius, count), angles)]


def distance(shape, x, y, r, rng):
    """Signed distance in pixels to a shape of outer size about r around the origin."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "ring":
        return np.abs(np.hypot(x, y) - r * 0.75) - r * 0.25
    if shape == "rectangle":
        w, h = (r, r * rng.uniform(0.3, 1.0)) if rng.random() < 0.5 else (r * rng.uniform(0.3, 1.0), r)
        return polygon(x, y, [(-w, -h), (w, -h), (w, h), (-w, h)])
    if shape == "triangle":
        w = r * rng.uniform(0.8, 1.1)
        top = rng.choice([0.0, 0.0, 0.0, rng.uniform(-0.5, 0.5)]) * w
        return polygon(x, y, [(top, -r), (w, r * 0.8), (-w, r * 0.8)])
    if shape == "star":
        return polygon(x, y, around(10, [r * 1.1, r * 0.45] * 5, -np.pi / 2))
    if shape == "diamond":
        return polygon(x, y, [(0, -r * 1.1), (r * 0.75, 0), (0, r * 1.1), (-r * 0.75, 0)])
    if shape == "hexagon":
        return polygon(x, y, around(6, r, 0.0))
    arm = r * rng.uniform(0.25, 0.35)
    return np.minimum(polygon(x, y, [(-r, -arm), (r, -arm), (r, arm), (-r, arm)]), polygon(x, y, [(-arm, -r), (arm, -r), (arm, r), (-arm, r)]))


def background(kind, color, rng, noise, plain):
    """A background of the kind, far enough from the shape's color to be told from it."""
    for _ in range(50):
        value = rng.uniform(0.1, 0.5) if kind == "dark" else rng.uniform(0.75, 1.0)
        saturation = rng.uniform(0, 0.2) if value > 0.7 else rng.uniform(0, 0.5)
        base = 255 * np.array(colorsys.hsv_to_rgb(rng.random(), saturation, value))
        if np.abs(base - color).sum() > 110:
            break
    canvas = np.broadcast_to(base, (SIDE, SIDE, 3)).copy()
    if plain:
        return canvas
    if kind == "striped":
        angle, period = rng.uniform(0, np.pi), rng.uniform(4, 14)
        y, x = np.mgrid[:SIDE, :SIDE]
        canvas -= (rng.uniform(6, 22) * (np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period) > 0))[..., None]
    elif kind == "grainy":
        canvas += noise.normal(0, rng.uniform(4, 14), (SIDE, SIDE, 1))
    elif rng.random() < 0.4:
        canvas += (np.linspace(-1, 1, SIDE) * rng.uniform(-15, 15))[:, None, None]
    return canvas


def draw(scene: words.Scene, rng: random.Random, lesson: str = "varied") -> np.ndarray:
    """Half of the `varied` pictures are plain (even background, upright shape); the others vary in every way."""
    plain = lesson != "varied" or rng.random() < 0.5
    noise = np.random.default_rng(rng.getrandbits(32))
    r = {"small": rng.uniform(4, 8), "medium": rng.uniform(8, 12), "big": rng.uniform(12, 17)}[scene.size]
    third = (SIDE - 2 * r) / 3
    cx = r + third * (words.COLUMNS.index(scene.column) + rng.random())
    cy = r + third * (words.ROWS.index(scene.row) + rng.random())
    color = np.clip(np.array(rng.choice(ANCHORS[scene.color])) + noise.normal(0, rng.choice([0, 5]), 3), 0, 255)
    canvas = background(scene.background, color, rng, noise, plain)
    turn = 0.0 if plain else rng.gauss(0, 0.08)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    x, y = x - cx, y - cy
    d = distance(scene.shape, x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn), r, rng)
    fill = color * (1 + rng.uniform(-0.12, 0.12) * (y / r)[..., None] * (rng.random() < 0.3) * (not plain))
    if not plain and rng.random() < 0.15:  # a darker edge
        fill = np.where((d > -1.5)[..., None], fill * 0.6, fill)
    cover = np.clip(0.5 - d / rng.uniform(0.6, 1.6), 0, 1)[..., None]
    return np.clip(np.rint(canvas * (1 - cover) + fill * cover), 0, 255).astype(np.uint8)


def pictures(count: int, seed: int, lesson: str = "varied"):
    """Yields (scene, caption, pixels of 64x64x3). `easy`: big shapes, even light backgrounds, captions that name the shape
    alone. `plain`: even light backgrounds and upright shapes of every size."""
    rng = random.Random(seed)
    for _ in range(count):
        scene = words.random_scene(rng)
        if lesson != "varied":
            scene.background = "light"
        if lesson == "easy":
            scene.size = "big"
        text = words.article(scene.shape) if lesson == "easy" else words.caption(scene)
        yield scene, text, draw(scene, rng, lesson)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--count", type=int, default=12000)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--lesson", choices=["easy", "varied", "plain"], default="varied")
    args = parser.parse_args()
    from PIL import Image

    os.makedirs(os.path.join(args.out, "images"), exist_ok=True)
    records = []
    for i, (_, caption, pixels) in enumerate(pictures(args.count, args.seed, args.lesson)):
        name = f"{i:05}.png"
        Image.fromarray(pixels).save(os.path.join(args.out, "images", name))
        turns = [{"from": "human", "value": "<image>\nDescribe the picture."}, {"from": "gpt", "value": caption}]
        records.append({"id": f"picture-{i}", "image": name, "conversations": turns})
    with open(os.path.join(args.out, "captions.json"), "w") as f:
        json.dump(records, f, indent=0)
    print(f"{len(records)} pictures")
