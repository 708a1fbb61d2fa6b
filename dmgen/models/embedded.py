"""The language models inside the package, by name."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = {
    "tiny-bios": Path(__file__).parent / "tiny_bios",
    "tiny-bios-0.1": Path(__file__).parent / "tiny_bios_0_1",
}
