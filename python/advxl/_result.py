"""The result of an evaluation."""

from __future__ import annotations

import json
import math
import os
from typing import Any


class Result:
    """The result of an evaluation. ``result["key"]`` returns any field of ``result.json``; common ones are attributes.

    With several norms, the fields describe the union (robust under all norms), and ``evaluations`` has one result per
    norm.
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def __getitem__(self, key: str) -> Any:
        return self._fields[key]

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    @property
    def robust_accuracy(self) -> float:
        """Share of images that no attack fooled."""
        return float(self._fields["robust_accuracy"])

    @property
    def clean_accuracy(self) -> float:
        """Share of clean images that are classified correctly."""
        stages = self._fields.get("stages") or self._fields["evaluations"][0]["stages"]
        return float(stages[0]["robust_accuracy"])

    @property
    def interval_95(self) -> tuple[float, float]:
        """Wilson 95 % confidence interval of the robust accuracy, for randomly drawn images."""
        low, high = self._fields["interval_95"]
        return low, high

    @property
    def robust(self) -> list[bool]:
        """For each image, whether it is classified correctly after every attack."""
        return list(self._fields["robust"])

    @property
    def flags(self) -> list[dict[str, str]]:
        """Warnings about the results: ``check``, the heading in docs/reference/result_json.md, and ``message``."""
        if "flags" in self._fields:
            return list(self._fields["flags"])
        return [flag for one in self._fields["evaluations"] for flag in one["flags"]]

    @property
    def evaluations(self) -> list["Result"]:
        """One result per norm."""
        return [Result(one) for one in self._fields["evaluations"]] if "evaluations" in self._fields else [self]

    def to_dict(self) -> dict[str, Any]:
        """All fields, as in ``result.json``."""
        return self._fields

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all fields as JSON."""
        temporary = f"{os.fspath(path)}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(self._fields, file, indent=2)
            file.write("\n")
        os.replace(temporary, path)

    def __repr__(self) -> str:
        low, high = self.interval_95
        lines = []
        for one in self.evaluations:
            fields = one._fields
            if fields.get("norm"):
                lines.append(f"{fields['norm']}, epsilon {fields['epsilon']}")
            for stage in fields["stages"]:
                lines.append(
                    f"  {stage['attack']:<9} {100 * stage['robust_accuracy']:6.2f} %  "
                    f"({stage['robust_count']} of {len(fields['robust'])} images, {stage['seconds']:.1f} s)"
                )
        lines.append(
            f"robust accuracy {100 * self.robust_accuracy:.2f} % (95 %: {100 * low:.1f} to {100 * high:.1f} %)"
        )
        bound = self._fields.get("bound")
        if bound is not None:
            lines.append(
                f"autoattack fast: the full standard version would be at most {math.ceil(100 * bound['points'] - 1e-9) / 100:g} "
                f"points lower ({100 * bound['confidence']:.0f} %)"
            )
        lines += [f"warning: {flag['message']} ({flag['check']})" for flag in self.flags]
        return "\n".join(lines)
