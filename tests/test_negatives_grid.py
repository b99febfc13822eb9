"""The grid of negatives: what is false of an image is marked in the picture itself, and what is true is not."""

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from tiny import tiny_image

from aspo.negatives import pictures


def scene(circle, star):
    """A circle and a star of these colours."""
    things = [("circle", circle, "top left"), ("star", star, "top")]
    return {"things": [{"shape": s, "colour": c, "size": "small", "place": p} for s, c, p in things], "seed": 0}


def drawn_text(monkeypatch):
    """What `plot_grid` is about to write: for each text its box in the picture, (left, top, right, bottom) pixels."""
    boxes = []

    class Seen(Figure):
        def savefig(self, path, dpi):
            super().savefig(path, dpi=dpi)
            self.set_dpi(dpi)
            self.canvas.draw()
            height = self.canvas.get_width_height()[1]
            for text in self.findobj(Text):
                if text.get_text():
                    (left, bottom), (right, top) = text.get_window_extent().get_points()
                    box = tuple(round(float(edge)) for edge in (left, height - top, right, height - bottom))
                    boxes.append((text.get_text(), box))

    monkeypatch.setattr(pictures, "Figure", Seen)
    return boxes


def test_false_sentences_stand_in_red_and_true_ones_in_green(tmp_path, monkeypatch):
    """The picture's own pixels, in the boxes where the sentences were written."""
    scenes = [scene("red", "blue"), scene("green", "blue"), scene("red", "pink")]
    text = "The circle is red. The star is blue. It is nice."
    said = {"The circle is red.": (True, False, True), "The star is blue.": (True, True, False), "It is nice.": None}
    rows = [{"id": "a", "prompt": "What?", "images": ["right.png"], "negative_images": ["one.png", "two.png"],
             "chosen": text, "scene": scenes[0], "negative_scenes": scenes[1:]}]  # fmt: skip
    for name in ("right", "one", "two"):
        tiny_image("yellow").save(tmp_path / f"{name}.png")
    boxes = drawn_text(monkeypatch)
    pictures.plot_grid(rows, tmp_path, tmp_path / "grid.png", "misp negatives")
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "grid.png").convert("RGB"))).float()

    def inked(box, colour):
        """How many pixels of a box are of this colour or between it and the white paper, and of no other."""
        left, top, right, bottom = box
        ink = 255 - pixels[top:bottom, left:right].flatten(0, 1)
        full = 255 - torch.tensor([float(part) for part in bytes.fromhex(colour[1:])])
        share = (ink @ full / full.square().sum()).clamp(0, 1)
        return int(((ink - share[:, None] * full).abs().amax(1) < 12).logical_and(share > 0.3).sum())

    for sentence, truths in said.items():
        found = sorted((box, t) for t, box in boxes if t.removeprefix("✗ ") == sentence)
        assert len(found) == 3  # below the right image and each negative, from left to right
        for n, (box, written) in enumerate(found):
            truth = None if truths is None else truths[n]
            colours = {True: pictures.TRUE_COLOUR, False: pictures.FALSE_COLOUR, None: pictures.PLAIN}
            counts = {of: inked(box, colour) for of, colour in colours.items()}
            assert counts.pop(truth) > 20 and not any(counts.values()), (sentence, n, counts)
            assert written.startswith("✗") == (truth is False)
