"""When weights are pruned: a dense warm-up, then pruned, then a dense tail, in steps of the weight's optimizer."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Linears are pruned in the optimizer steps from ``begin`` on, before ``end``; counted from 0."""

    begin: int
    end: int | None  # None: to the end of training

    def prunes_at(self, step: int) -> bool:
        return self.begin <= step and not self.ends_by(step)

    def ends_by(self, step: int) -> bool:
        return self.end is not None and step >= self.end

    def __str__(self) -> str:
        """The dense phases, for the report."""
        phases = [f"before optimizer step {self.begin}"] if self.begin else []
        phases += [f"from optimizer step {self.end} on"] if self.end is not None else []
        return "dense " + " and ".join(phases)
