"""What a transfer did, tensor by tensor: printed, and kept beside the run."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from ..files import write_json, write_text
from ..names import listed

SHOWN = 10  # names that an error or a report spells out

MEANING = {
    "loaded": "of the network: as the pretrained weights have them",
    "adapted": "of the network: from the pretrained weights, in another shape",
    "new": "of the network: start anew",
    "unused": "of the pretrained weights: the network has no place for them",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the network: how it got its values, and how many of them come from the checkpoint."""

    name: str
    shape: tuple[int, ...]
    how: str  # loaded | adapted | new
    reused: int
    new: int
    note: str = ""


@dataclass
class TransferReport:
    """What `load_pretrained` did; `str()` is the text that it prints."""

    checkpoint: str
    entries: list[Entry]
    unused: dict[str, tuple[int, ...]]
    checkpoint_parameters: int
    targets: dict[str, list[str]]
    mismatches: list[str] = field(default_factory=list)

    def totals(self) -> dict[str, dict[str, float]]:
        """Tensors, parameters and per cent: of the network for loaded, adapted, new; of the checkpoint for unused.

        An adapted tensor's values that are new (heads of new targets) count as new parameters.
        """
        parameters = {
            "loaded": sum(entry.reused for entry in self.entries if entry.how == "loaded"),
            "adapted": sum(entry.reused for entry in self.entries if entry.how == "adapted"),
            "new": sum(entry.new for entry in self.entries),
        }
        whole = sum(parameters.values())
        totals = {
            how: {
                "tensors": sum(entry.how == how for entry in self.entries),
                "parameters": count,
                "percent": 100 * count / max(whole, 1),
            }
            for how, count in parameters.items()
        }
        unused = sum(prod(shape) for shape in self.unused.values())
        percent = 100 * unused / max(self.checkpoint_parameters, 1)
        return {**totals, "unused": {"tensors": len(self.unused), "parameters": unused, "percent": percent}}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "totals": self.totals()}

    def __str__(self) -> str:
        lines = [
            f"Weights of the network before training, from the pretrained weights {self.checkpoint}",
            f"{'':10}{'tensors':>9}{'parameters':>15}{'per cent':>10}",
        ]
        for how, total in self.totals().items():
            numbers = f"{total['tensors']:>9}{total['parameters']:>15,}{_percent(total['percent']):>10}"
            lines.append(f"{how:10}{numbers} {MEANING[how]}")
        adapted = [f"{entry.name}: {entry.note}" for entry in self.entries if entry.how == "adapted"]
        lines += _listed("adapted", adapted) + _listed("new", [e.name for e in self.entries if e.how == "new"])
        lines += _listed("unused", list(self.unused))
        lines += [f"targets {kind}: {', '.join(names) or '-'}" for kind, names in self.targets.items()]
        lines += [f"note: {mismatch}" for mismatch in self.mismatches]
        return "\n".join(lines)

    def save(self, path: str | os.PathLike) -> None:
        """JSON at `path`, and the text beside it with the suffix ``.txt``."""
        write_json(path, self.to_dict())
        write_text(f"{os.path.splitext(path)[0]}.txt", f"{self}\n")


def _listed(title: str, names: list[str]) -> list[str]:
    return [f"{title}: {listed(names, SHOWN)}"] if names else []


def _percent(value: float) -> str:
    return f"{value:.2f}" if value < 99.995 or value == 100 else "99.99"
