"""Random training scripts: what each action does to a model, and to what its oracle knows of it."""

import copy
import io
import re
from collections import Counter
from dataclasses import dataclass, replace

import torch
import torch._dynamo.config
from hypothesis import note
from hypothesis import strategies as st
from torch import Tensor, nn

import sparse_compile
from fuzz.programs import Model, Program, input_of, real, source, spelt
from fuzz.session import OPTIMIZERS, Diverged, Kind, Places, Session

# What a script may do.  ``leading`` is an index into the program's.


@dataclass(frozen=True)
class Train:
    """An optimizer's step, of one or several microbatches."""

    leading: int
    microbatches: int
    seed: int
    around: bool | None  # checkpointing of the whole model

    def run(self, session: Session) -> None:
        leading = session.program.leading[self.leading % len(session.program.leading)]
        before: dict[str, Tensor] = {}
        once = session.kind.calls_once
        for index in range(1 if once else self.microbatches):
            called = session.call(leading, self.seed + index, None if once else self.around)
            weighting = torch.randn(called.y.shape, generator=torch.Generator().manual_seed(self.seed + index))
            called.weighting = weighting.to(called.y)
            called.y.backward(called.weighting)
            before = session.compare(called, before)
            before.pop("gradient of input")
        weights = {index for step in session.program.steps for index in step.weights}
        passed = [index for index in weights if session.weight(index).requires_grad]
        nn.utils.clip_grad_norm_(session.model.parameters(), 1.0)
        if isinstance(session.optimizer, torch.optim.LBFGS):
            session.optimizer.step(lambda: 0.0)
        else:
            session.optimizer.step()
        session.optimizer.zero_grad()
        if session.recipe.prunes:
            for index in passed:
                if session.recipe_of(index) is not None:
                    session.trained.setdefault(index, session.betas[index])


@dataclass(frozen=True)
class Evaluate:
    leading: int
    seed: int
    inference: bool

    def run(self, session: Session) -> None:
        leading = session.program.leading[self.leading % len(session.program.leading)]
        with torch.inference_mode() if self.inference else torch.no_grad():
            session.compare(session.call(leading, self.seed, training=False))


@dataclass(frozen=True)
class Forward:
    """With gradients, which no one asks for."""

    leading: int
    seed: int

    def run(self, session: Session) -> None:
        leading = session.program.leading[self.leading % len(session.program.leading)]
        session.compare(session.call(leading, self.seed))


@dataclass(frozen=True)
class Edit:
    weight: int
    how: str
    seed: int

    def run(self, session: Session) -> None:
        index = self.weight % len(session.program.weights)
        weight = session.weight(index)
        noise = 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(self.seed))
        noise = noise.to(weight)
        if self.how == "add":
            with torch.no_grad():
                weight.add_(noise)
        elif self.how == "copy":
            with torch.no_grad():
                weight.copy_(weight.flip(0) + noise)
        elif self.how == "data":
            weight.data.mul_(-1.0).add_(noise)
            sparse_compile.invalidate(session.model)
            session.edited(range(len(session.program.weights)))
        elif self.how == "new data":
            weight.data = weight.data * 0.5 + noise
        elif self.how == "new parameter":
            new = nn.Parameter(weight.detach() + noise, weight.requires_grad)
            setattr(session.model, f"w{index}", new)
            session.forget(index)
            session.optimize(session.optimizer_name)
        session.edited([index])


@dataclass(frozen=True)
class Load:
    """Other weights, into the same parameters."""

    seed: int

    def run(self, session: Session) -> None:
        session.model.load_state_dict(Model(session.program, self.seed).state_dict())
        session.edited(range(len(session.program.weights)))


@dataclass(frozen=True)
class Freeze:
    weight: int
    frozen: bool

    def run(self, session: Session) -> None:
        session.weight(self.weight % len(session.program.weights)).requires_grad_(not self.frozen)


@dataclass(frozen=True)
class NewOptimizer:
    name: str

    def run(self, session: Session) -> None:
        session.optimize(self.name)


@dataclass(frozen=True)
class Copy:
    """A deep copy, which is told the betas or not; training goes on with it or with the original."""

    told: bool
    stay: bool

    def run(self, session: Session) -> None:
        kept_of = (session.model, session.step, session.trained, session.masks, session.optimizer)
        session.compile(copy.deepcopy(session.model))
        session.trained, session.masks = {}, {}
        if self.told and session.recipe.has_beta:
            session.trained = dict(kept_of[2])
            sparse_compile.set_beta(session.model, {f"w{index}": beta for index, beta in session.trained.items()})
        session.optimize(session.optimizer_name)
        if self.stay:
            Train(0, 1, 5, None).run(session)
            session.model, session.step, session.trained, session.masks, session.optimizer = kept_of


@dataclass(frozen=True)
class Resume:
    """In what a new process would make, from files; called before they are loaded, or not."""

    seed: int
    called: bool

    def run(self, session: Session) -> None:
        file = io.BytesIO()
        torch.save((session.model.state_dict(), session.optimizer.state_dict()), file)
        file.seek(0)
        model = real(session.program)(session.program, self.seed).to(session.kind.device)
        for new, old in zip(model.parameters(), session.model.parameters(), strict=True):
            new.requires_grad_(old.requires_grad)
        trained, masks = session.trained, session.masks
        session.compile(model)
        session.optimize(session.optimizer_name)
        if self.called:
            session.trained, session.masks = {}, {}
            Forward(0, self.seed).run(session)
        session.trained, session.masks = trained, masks
        state, optimizer_state = torch.load(file)
        model.load_state_dict(state)
        session.optimizer.load_state_dict(optimizer_state)
        session.resumed = True


@dataclass(frozen=True)
class Tell:
    weight: int
    beta: float

    def run(self, session: Session) -> None:
        index = self.weight % len(session.program.weights)
        if session.recipe.has_beta and session.recipe_of(index) is not None:
            sparse_compile.set_beta(session.model, {f"w{index}": self.beta})
            session.trained[index] = self.beta


Action = Train | Evaluate | Forward | Edit | Load | Freeze | NewOptimizer | Copy | Resume | Tell


@dataclass(frozen=True)
class Script:
    """Of a model whose weights are made from ``seed``."""

    seed: int
    actions: tuple[Action, ...]


EDITS = ("add", "copy", "data", "new data", "new parameter")


@st.composite
def scripts(draw: st.DrawFn, most: int = 6, small: bool = False) -> Script:
    """``small`` ones need few graphs beside that of a training step."""
    seeds, weights, leading = st.integers(0, 2**16), st.integers(0, 7), st.integers(0, 1)
    train = st.builds(
        Train, leading=leading, microbatches=st.sampled_from((1, 1, 1, 2)), seed=seeds,
        around=st.none() if small else st.sampled_from((None, None, None, True, False)),
    )  # fmt: skip
    anything = [
        train, train,
        st.builds(Forward, leading=leading, seed=seeds),
        st.builds(Edit, weight=weights, how=st.sampled_from(EDITS), seed=seeds),
        st.builds(Load, seed=seeds),
        st.builds(NewOptimizer, name=st.sampled_from(sorted(OPTIMIZERS))),
        st.builds(Copy, told=st.booleans(), stay=st.booleans()),
        st.builds(Resume, seed=seeds, called=st.booleans()),
        st.builds(Tell, weight=weights, beta=st.sampled_from((1.25, 1.5, 1.75))),
    ]  # fmt: skip
    if not small:
        anything += [
            st.builds(Evaluate, leading=leading, seed=seeds, inference=st.booleans()),
            st.builds(Freeze, weight=weights, frozen=st.booleans()),
        ]
    # Behind whatever was done last a step tells whether it was right.
    between = draw(st.lists(st.one_of(anything), max_size=most))
    return Script(seed=draw(seeds), actions=(draw(train), *between, draw(train)))


def run(program: Program, script: Script, kind: Kind, mvue: bool, places: Places) -> bool:
    """Whether it could be compared to its end."""
    session = Session(program, script.seed, kind, mvue, places)
    try:
        for action in script.actions:
            action.run(session)
    except Diverged:
        return False
    return True


def runs(program: Program) -> bool:
    """Whether the dense model may do what it does, in place and under autocast.

    Checkpointing hides that backward needs what was written over; what traces a checkpointed part sees it.
    """
    program = replace(program, steps=tuple(replace(step, checkpointed=None) for step in program.steps))
    model, x = real(program)(program, 0), input_of(program, program.leading[0], 0).requires_grad_()
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=program.dtype == "autocast"):
            y = model(x)
        y.sum().backward()
    except RuntimeError as error:
        if not re.search("modified by an inplace operation|both inputs should have same dtype", str(error)):
            raise
        return False
    return True


def check(program: Program, scripts: list[Script], kind: Kind, mvue: bool) -> Counter[str]:
    """How many scripts were compared to their end, and how many grew too large."""
    note(source(program, spelt))
    if not runs(program):
        return Counter()
    torch._dynamo.reset()
    sparse_compile.report().graphs.clear()
    compared: Counter[str] = Counter()
    places = Places()
    patch = torch._dynamo.config.patch(
        automatic_dynamic_shapes=program.dynamic is None, recompile_limit=64, fail_on_recompile_limit_hit=True
    )
    with patch:
        for script in scripts:
            note(f"{script}")
            compared["compared" if run(program, script, kind, mvue, places) else "too large"] += 1
    return compared
