"""Images of rows: where they lie, what may be read, and their pixels as RGB.

Images come from strangers. So only FORMATS are read (Pillow hands some others, such as EPS, to programs outside), sizes
are checked before anything is decoded, a file is a file and no device, and whatever Pillow raises becomes a ValueError
that names the image. Of several frames the first is taken. docs/untrusted.md says what is trusted and what is not.
"""

import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "AVIF")
PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")
BYTES_A_PIXEL = 8  # of the largest kind that is read, four channels of 16 bits: more than an image's file needs
PIXELS_VARIABLE = "ASPO_MAX_IMAGE_PIXELS"
ORIENTATION = 0x0112  # EXIF's tag: how the camera was held
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Row = Mapping[str, Any]


def set_max_pixels(text: str | None) -> None:
    """Pillow's MAX_IMAGE_PIXELS, the most pixels of an image that is read, from a text; None leaves it as it is."""
    if text is None:
        return
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ValueError(f"{PIXELS_VARIABLE} is {text!r}; it must be a whole number of pixels, 1 or more")
    Image.MAX_IMAGE_PIXELS = int(text)


set_max_pixels(os.environ.get(PIXELS_VARIABLE))


def load_images(row: Row, column: str = "images", root: str | Path | None = None) -> list[Image.Image]:
    """The images of one of the row's image columns, decoded to RGB. Relative paths start at `root`.

    A file's image is turned as its EXIF says, 16 bits become 8. Raises ValueError naming an image that cannot be read.
    """
    return [_decoded(entry, root) for entry in image_entries(row, column)]


def image_entries(row: Row, column: str = "images") -> list[Any]:
    """The entries of an image column ("images": or of `image`), which may be one entry or a list."""
    found = row[column] if row.get(column) is not None else row.get("image") if column == "images" else None
    if found is None:
        return []
    if isinstance(found, str | Path | Mapping | Image.Image):
        return [found]
    if not isinstance(found, Sequence):
        raise ValueError(f"it is a {type(found).__name__}; it must be an image or a list of images")
    return list(found)


def in_memory(entry: Any) -> bool:
    """Whether an entry is an image itself, and no path of one."""
    return isinstance(entry, Image.Image) or (isinstance(entry, Mapping) and entry.get("bytes") is not None)


def image_path(entry: Any, root: str | Path | None) -> Path:
    """Where an image entry without bytes lies; a relative path starts at `root`."""
    path = entry.get("path") if isinstance(entry, Mapping) else entry
    if not isinstance(path, str | Path):
        raise ValueError(
            f"an image must be a path, a PIL image or a dict with 'bytes' or 'path', got {type(entry).__name__}"
        )
    if isinstance(path, str) and ("://" in path or path.startswith("data:")):
        raise ValueError(f"image {short_path(path)} is an address: rows name files, so save it as one first")
    return Path(root or "", path)


def check_within(path: Path, folders: Sequence[Path], fix: str = "--image-root / (image_root='/')") -> None:
    """ValueError where `path`, with `..` and links followed, lies in none of `folders` (resolved ones)."""
    try:
        place = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a NUL
        raise ValueError(f"image {short_path(path)} is no path: {error}") from error
    if not any(place.is_relative_to(folder) for folder in folders):
        leads = f", it leads to {short_path(place)}" if place != path else ""
        raise ValueError(
            f"image {short_path(path)} lies outside of {' and '.join(map(str, folders))}{leads}; rows read from files "
            f"may not name such images. If you trust these rows, allow a folder that holds it, or all with /: {fix}"
        )


def image_bytes(entry: Any, root: str | Path | None = None) -> bytes:
    """The encoded bytes of an image entry: a file's content as it is, a PIL image as PNG."""
    if isinstance(entry, Image.Image):
        buffer = io.BytesIO()
        (entry if entry.mode in PNG_MODES else entry.convert("RGB")).save(buffer, format="PNG")
        return buffer.getvalue()
    if in_memory(entry):
        if not isinstance(entry["bytes"], bytes):
            raise ValueError(f"an image's 'bytes' are {type(entry['bytes']).__name__}; they must be bytes")
        return entry["bytes"]
    return _checked_file(image_path(entry, root)).read_bytes()


def _checked_file(path: Path) -> Path:
    """A path, if it is a file's and the file is no larger than an image may be."""
    if not is_file(path):
        raise ValueError(
            f"no image file {short_path(path)}: check the path, or say where relative paths start (image_root)"
        )
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and (size := path.stat().st_size) > BYTES_A_PIXEL * limit:
        raise ValueError(f"image {short_path(path)} cannot be read: {_too_large(f'a file of {size:,} bytes')}")
    return path


def is_file(path: Path) -> bool:
    """Path.is_file, also for what cannot be a path at all. A device or a pipe is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def check_image(entry: Any) -> None:
    """That an image entry is one that can be read, by its header: nothing is decoded."""
    image_size(entry)


def image_size(entry: Any) -> tuple[int, int]:
    """(height, width) of an image as `load_images` gives it, from its header."""
    if isinstance(entry, Image.Image):
        if 0 in entry.size:
            raise ValueError(f"an image of {entry.width} x {entry.height} pixels")
        return entry.height, entry.width
    with _opened(entry, None) as image:
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def _decoded(entry: Any, root: str | Path | None) -> Image.Image:
    if isinstance(entry, Image.Image):
        return _rgb(entry)
    with _opened(entry, root) as image:
        turn = UPRIGHT.get(_orientation(image))
        decoded = _rgb(image)
        return decoded if turn is None else decoded.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is not known: save it with 8 bits")
    if image.mode.startswith("I"):  # 16 bits; `convert` would cut them off at 255
        image = image.convert("I")
        low, high = cast(tuple[int, int], image.getextrema())
        if low < 0 or high > 65535:
            raise ValueError("its pixels have more than 16 bits: save it with 8")
        image = image.point(lambda value: value * (1 / 257) + 0.5).convert("L")
    return image.convert("RGB")


@contextmanager
def _opened(entry: Any, root: str | Path | None) -> Iterator[Image.Image]:
    """An encoded image, its header read; whatever goes wrong inside is a ValueError that names it."""
    source = io.BytesIO(image_bytes(entry)) if in_memory(entry) else _checked_file(image_path(entry, root))
    name = entry.get("path") if isinstance(entry, Mapping) else entry
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # Pillow's soft limit is our hard one
            warnings.simplefilter("ignore", UserWarning)  # of odd metadata
            with Image.open(source, formats=_formats()) as image:
                if 0 in image.size:
                    raise ValueError(f"it has {image.width} x {image.height} pixels")
                yield image
    except Exception as error:  # Pillow's readers raise SyntaxError, struct.error, IndexError ... on broken files
        raise ValueError(f"image {short_path(name or 'in the row')} cannot be read: {_reason(error)}") from error


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    """How an image lies, 1 to 8: EXIF's, as the header has it (Pillow itself turns TIFF). A broken one is none."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif") or b"")
        found = exif.get(ORIENTATION, 1)
        return found if isinstance(found, int) and found in UPRIGHT else 1
    except Exception:  # as above; the pixels may be fine
        return 1


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image of a kind that is read ({', '.join(FORMATS)})"
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return _too_large("it")
    return " ".join(str(error).split())[:300] or type(error).__name__


def _too_large(what: str) -> str:
    return (
        f"{what} has more than {Image.MAX_IMAGE_PIXELS:,} pixels: shrink it, or raise the limit (environment variable "
        f"{PIXELS_VARIABLE})"
    )


def short_path(path: Any) -> str:
    """A path, cut to what fits into an error line."""
    text = str(path)
    return text if len(text) <= 200 else f"{text[:120]}...{text[-60:]}"
