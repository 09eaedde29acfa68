"""What a generated file says about its origin: an XMP packet that marks it as generated and says by what.

The packet marks the file with IPTC's ``DigitalSourceType`` (IPTC Photo Metadata Standard; the value is from IPTC's
NewsCodes), which search engines and image editors read, and names the software, the generator and what it was given,
so that ``catinfer inspect`` can print the command that makes the file again. It holds no dates, names or paths: equal
images have equal packets. Serialised as ISO 16684-1 (XMP, part 1) says, in at most ``MAX_PACKET`` bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import repeat

from catgan.text import printable

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
NAMESPACES = {
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "catgan": "urn:uuid:b99669f5-c277-57bf-acd2-2eec348aa10d#",
}
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
KINDS = ("image", "sheet", "sweep", "walk", "blend", "training")
MAX_PACKET = 65_502  # bytes; what fits into a segment of a JPEG file after the segment's name
# Characters of a list in the packet. With longer ones it would not fit; they are replaced by length and SHA-256.
MAX_SEEDS_TEXT, MAX_PSIS_TEXT = 50_000, 10_000
MAX_CLASSES_TEXT = 9_000  # bytes; of several classes, which a sheet of several psi does not have
_START = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{RDF}"><rdf:Description rdf:about=""'
    + "".join(f' xmlns:{prefix}="{uri}"' for prefix, uri in NAMESPACES.items())
)
_END = '/></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
# xml.sax.saxutils would do it, but imports urllib.request: 10 ms of a command that takes 150.
_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"})


@cache
def this_software() -> str:
    """Name and version of this program. Looked up once, since that reads the installed packages."""
    from catgan.dataset import tool  # imports importlib.metadata

    return tool()


@dataclass(frozen=True)
class Provenance:
    """The origin of one generated file.

    Attributes:
        kind: what it shows: one "image" of a seed, a "sheet" of all seeds, a "sweep" (a sheet with a row for each
            psi), a "walk" through the seeds, a "blend" of two seeds, or images of a generator in "training", of which
            nothing else is recorded.
        generator_sha256: of the ONNX file, in hex.
        seeds: in order.
        psi: the factor of the latents; of a sweep one for each row.
        labels: whether the seeds are written below the images.
        device: that computed the images, "cpu" or "cuda".
        mix: of a blend, the percentage of the second seed.
        directions: {number of a direction: multiple} that all latents are moved by, see ``infer.directions``.
        classes: names of the classes; of a sheet with several, one for each row. Empty if the generator has none.
        software: name and version.
    """

    kind: str
    generator_sha256: str | None = None
    seeds: Sequence[int] = ()
    psi: Sequence[float] = ()
    labels: bool = False
    device: str | None = None
    mix: int | None = None
    directions: Mapping[int, float] = field(default_factory=dict)
    classes: Sequence[str] = ()
    software: str = field(default_factory=this_software)

    def packet(self) -> bytes:
        """The XMP packet, UTF-8, at most ``MAX_PACKET`` bytes. Equal origins give equal bytes."""
        assert self.kind in KINDS, self.kind
        properties = [f' {name}="{value.translate(_ESCAPES)}"' for name, value in self._properties()]
        packet = "".join((_START, *properties, _END)).encode()
        assert len(packet) <= MAX_PACKET, len(packet)
        return packet

    def packets(self, seeds: Iterable[int], classes: Iterable[tuple[str, ...]] = repeat(())) -> Iterator[bytes]:
        """The packet of each file with one of ``seeds`` and of ``classes`` alone; faster than making each anew."""
        halves: dict[tuple[str, ...], list[bytes]] = {}
        for seed, names in zip(seeds, classes, strict=False):
            if names not in halves:
                halves[names] = replace(self, seeds=(0,), classes=names).packet().split(b'Seeds="0"')
            before, after = halves[names]
            yield b'%sSeeds="%d"%s' % (before, seed, after)

    def _properties(self) -> Iterator[tuple[str, str]]:
        yield "Iptc4xmpExt:DigitalSourceType", SOURCE_TYPE
        yield "xmp:CreatorTool", printable(self.software)[:200]
        yield "catgan:Kind", self.kind
        if self.generator_sha256:
            yield "catgan:GeneratorSHA256", self.generator_sha256
        if self.seeds:
            text = ranges(self.seeds)
            if len(text) <= MAX_SEEDS_TEXT:
                yield "catgan:Seeds", text
            else:
                yield "catgan:SeedCount", str(len(self.seeds))
                yield "catgan:SeedsSHA256", seeds_sha256(self.seeds)
        psi = ",".join(map(repr, map(float, self.psi)))
        if psi and len(psi) <= MAX_PSIS_TEXT:
            yield "catgan:Psi", psi
        if self.labels:
            yield "catgan:Labels", "True"
        if self.device:
            yield "catgan:Device", self.device
        if self.mix is not None:
            yield "catgan:Mix", str(self.mix)
        if self.directions:
            moves = sorted(self.directions.items())
            yield "catgan:Directions", ",".join(f"{number}={float(amount)!r}" for number, amount in moves)
        if self.classes:
            text = classes_text(self.classes)
            if len(text.translate(_ESCAPES).encode()) <= MAX_CLASSES_TEXT:
                yield "catgan:Classes", text
            else:
                yield "catgan:ClassCount", str(len(self.classes))


def in_training() -> bytes:
    """The packet for images of a generator in training."""
    return Provenance("training").packet()


def classes_text(names: Sequence[str]) -> str:
    """Names as the packet and ``export/web/provenance.js`` write them: a JSON list without blanks."""
    return json.dumps(list(names), ensure_ascii=False, separators=(",", ":"))


def ranges(seeds: Sequence[int]) -> str:
    """A list of seeds in its order as ``--seeds`` takes it, such as ``3,7-12``."""
    if isinstance(seeds, range) and seeds.step == 1 and seeds:
        return str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]}-{seeds[-1]}"
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and parts[-1][1] + 1 == seed:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def seeds_sha256(seeds: Sequence[int]) -> str:
    """SHA-256 (hex) of the seeds as decimal numbers with commas between them."""
    return hashlib.sha256(",".join(map(str, seeds)).encode()).hexdigest()
