"""The charts of README.md and docs/: SVG files from the results, each for light and dark pages."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log2
from statistics import mean

from jinja2 import DictLoader, Environment, StrictUndefined

from figures import losses, steps

# Colours of a light and of a dark page: text, quiet text, lines, the baseline's bars, ours.
THEMES = {
    "light": {"text": "#1f2328", "quiet": "#59636e", "line": "#d1d9e0", "other": "#9aa5b1", "ours": "#0b6e4f"},
    "dark": {"text": "#f0f6fc", "quiet": "#9198a1", "line": "#3d444d", "other": "#656c76", "ours": "#3fb68b"},
}
WIDTH = 640
LEFT, RIGHT = 180, 60  # for names, and for a value beside the longest bar

_FRAME = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ title }}"
     font-family="system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif" font-size="13">
<text x="0" y="18" font-size="15" font-weight="600" fill="{{ text }}">{{ title }}</text>
{% block body %}{% endblock %}
<text x="0" y="{{ height - 6 }}" font-size="11" fill="{{ quiet }}">{{ source }}</text>
</svg>
"""
_AXIS = """\
{% for x, label, strong in ticks -%}
<line x1="{{ x }}" x2="{{ x }}" y1="{{ top - 6 }}" y2="{{ bottom }}" stroke="{{ quiet if strong else line }}"/>
<text x="{{ x }}" y="{{ bottom + 16 }}" text-anchor="middle" fill="{{ quiet }}">{{ label }}</text>
{% endfor -%}
"""
_BARS = """\
{% extends "frame" %}{% block body %}{% include "axis" -%}
<rect x="{{ left }}" y="30" width="12" height="12" fill="{{ other }}"/>
<text x="{{ left + 18 }}" y="41" fill="{{ text }}">torchao float8</text>
<rect x="{{ left + 130 }}" y="30" width="12" height="12" fill="{{ ours }}"/>
<text x="{{ left + 148 }}" y="41" fill="{{ text }}">sparse_compile, defaults</text>
{% for group in groups -%}
<text x="{{ left - 12 }}" y="{{ group.y + 25 }}" text-anchor="end" fill="{{ text }}">{{ group.name }}
<tspan fill="{{ quiet }}">{{ group.device }}</tspan></text>
{% for bar in group.bars -%}
<rect x="{{ left }}" y="{{ bar.y }}" width="{{ bar.length }}" height="16" rx="2"
      fill="{{ ours if bar.ours else other }}"/>
<text x="{{ left + bar.length + 6 }}" y="{{ bar.y + 13 }}" fill="{{ text }}"
      {% if bar.ours %}font-weight="600"{% endif %}>{{ bar.label }}</text>
{% endfor -%}
{% endfor %}{% endblock %}
"""
_DOTS = """\
{% extends "frame" %}{% block body %}{% include "axis" -%}
{% for row in rows -%}
<text x="{{ left - 12 }}" y="{{ row.y + 4 }}" text-anchor="end" fill="{{ text }}">{{ row.name }}</text>
{% for x in row.seeds -%}
<circle cx="{{ x }}" cy="{{ row.y }}" r="4" fill="none" stroke="{{ ours }}" stroke-width="1.5"/>
{% endfor -%}
<line x1="{{ row.mean }}" x2="{{ row.mean }}" y1="{{ row.y - 9 }}" y2="{{ row.y + 9 }}" stroke="{{ ours }}"
      stroke-width="3"/>
<text x="{{ width - 4 }}" y="{{ row.y + 4 }}" text-anchor="end" font-weight="600" fill="{{ text }}">
{{- row.label }}</text>
{% endfor %}{% endblock %}
"""
_CURVES = """\
{% extends "frame" %}{% block body -%}
{% for panel in panels -%}
<text x="{{ panel.left }}" y="44" font-weight="600" fill="{{ text }}">{{ panel.name }}</text>
{% for y, label in panel.levels -%}
<line x1="{{ panel.left }}" x2="{{ panel.right }}" y1="{{ y }}" y2="{{ y }}" stroke="{{ line }}"/>
<text x="{{ panel.left - 6 }}" y="{{ y + 4 }}" text-anchor="end" font-size="11" fill="{{ quiet }}">{{ label }}</text>
{% endfor -%}
{% for x, label in panel.rates -%}
<text x="{{ x }}" y="{{ bottom + 18 }}" text-anchor="middle" font-size="11" fill="{{ quiet }}">{{ label }}</text>
{% endfor -%}
{% for curve in panel.curves -%}
<polyline points="{% for x, y in curve.points %}{{ x }},{{ y }} {% endfor %}" fill="none" stroke-width="2"
          stroke="{{ ours if curve.ours else other }}"{% if curve.dashed %} stroke-dasharray="5 4"{% endif %}/>
{% for x, y in curve.points -%}
<circle cx="{{ x }}" cy="{{ y }}" r="3.5" fill="{{ ours if curve.ours else other }}"/>
{% endfor -%}
<line x1="{{ panel.left + 8 }}" x2="{{ panel.left + 36 }}" y1="{{ curve.key }}" y2="{{ curve.key }}" stroke-width="2"
      stroke="{{ ours if curve.ours else other }}"{% if curve.dashed %} stroke-dasharray="5 4"{% endif %}/>
<text x="{{ panel.left + 42 }}" y="{{ curve.key + 4 }}" font-size="11" fill="{{ text }}">{{ curve.name }}</text>
{% endfor -%}
{% endfor %}{% endblock %}
"""
_PIPELINE = """\
{% extends "frame" %}{% block body -%}
{% for box in boxes -%}
<rect x="{{ box.x }}" y="{{ box.y }}" width="{{ box.width }}" height="58" rx="6" fill="none"
      stroke="{{ ours if box.ours else line }}" stroke-width="{{ 2 if box.ours else 1 }}"/>
<text x="{{ box.x + box.width / 2 }}" y="{{ box.y + 23 }}" text-anchor="middle" font-weight="600" fill="{{ text }}">
{{- box.name }}</text>
<text x="{{ box.x + box.width / 2 }}" y="{{ box.y + 42 }}" text-anchor="middle" font-size="11" fill="{{ quiet }}">
{{- box.does }}</text>
{% endfor -%}
{% for x, y in arrows -%}
<path d="M {{ x }} {{ y }} h 12 m -5 -4 l 5 4 l -5 4" fill="none" stroke="{{ quiet }}" stroke-width="1.5"/>
{% endfor -%}
{% for y, label in rows -%}
<text x="0" y="{{ y }}" font-size="11" fill="{{ quiet }}">{{ label }}</text>
{% endfor %}{% endblock %}
"""
_TEMPLATES = {"frame": _FRAME, "axis": _AXIS, "bars": _BARS, "dots": _DOTS, "curves": _CURVES, "pipeline": _PIPELINE}


@dataclass(frozen=True, kw_only=True)
class Bar:
    y: float
    length: float
    label: str
    ours: bool


@dataclass(frozen=True, kw_only=True)
class Group:
    y: float
    name: str
    device: str
    bars: Sequence[Bar]


@dataclass(frozen=True, kw_only=True)
class Dots:
    y: float
    name: str
    seeds: Sequence[float]
    mean: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Curve:
    """``key``: where the legend has it."""

    points: Sequence[tuple[float, float]]
    name: str
    key: float
    ours: bool
    dashed: bool


@dataclass(frozen=True, kw_only=True)
class Panel:
    left: float
    right: float
    name: str
    levels: Sequence[tuple[float, str]]
    rates: Sequence[tuple[float, str]]
    curves: Sequence[Curve]


@dataclass(frozen=True, kw_only=True)
class Box:
    x: float
    y: float
    width: float
    name: str
    does: str
    ours: bool


# What happens, row by row, and whether it is this package that does it.
_STAGES = (
    (
        "when a graph is traced",
        (
            ("dynamo", "traces the model", False),
            ("expand, find", "every product", True),
            ("decide", "recipe or refusal", True),
            ("choose", "by measured times", True),
        ),
    ),
    (
        "when it is first called",
        (
            ("rewrite", "2:4 and FP8 products", True),
            ("verify", "shapes, strides", True),
            ("AOTAutograd", "forward, backward", False),
            ("Inductor", "fuses the casts", False),
        ),
    ),
    (
        "at each call",
        (
            ("weights", "pruned if they changed", True),
            ("forward", "fprop 2:4 FP8", True),
            ("backward", "wgrad 2:4, dgrad FP8", True),
            ("optimizer", "steps dense weights", False),
        ),
    ),
)


def _drawn(template: str, theme: str, **values: object) -> str:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, loader=DictLoader(_TEMPLATES)
    )
    return environment.get_template(template).render(width=WIDTH, left=LEFT, **THEMES[theme], **values)


def speed(theme: str) -> str:
    """Speeds of training steps over torch.compile in bf16: torchao's float8 and the defaults here."""
    compared = steps.compared_steps()
    longest = max(max(speeds[steps.TORCHAO], speeds[steps.SSTE]) for _, _, speeds in compared)
    unit = (WIDTH - LEFT - RIGHT) / longest
    top, groups = 60, []
    for index, (model, device, speeds) in enumerate(compared):
        y = top + 48 * index
        bars = [
            Bar(y=y + 18 * place, length=round(unit * speeds[kind], 1), label=f"{speeds[kind]:.2f}x", ours=place == 1)
            for place, kind in enumerate((steps.TORCHAO, steps.SSTE))
        ]
        groups.append(Group(y=y - 4, name=steps.SHORT_MODELS[model], device=device, bars=bars))
    bottom = top + 48 * len(compared) - 8
    ticks = [(round(LEFT + unit * at, 1), f"{at:g}x", at == 1) for at in (0, 0.5, 1, 1.5) if at <= longest]
    return _drawn(
        "bars", theme, height=bottom + 44, top=top, bottom=bottom, ticks=ticks, groups=groups,
        title="Training step: speed over torch.compile in bf16",
        source="Higher is better. Shapes with random weights, 1 GPU; measured: docs/performance.md",
    )  # fmt: skip


def loss(theme: str) -> str:
    """Validation losses over that of bf16: each seed, and their mean."""
    gaps = {arm: [100 * gap for gap in losses.gaps_to_bf16(arm)] for arm in losses.measured_arms()}
    every = [gap for of_arm in gaps.values() for gap in of_arm]
    low, high = floor(2 * min(every)) / 2, ceil(2 * max(every)) / 2
    unit = (WIDTH - LEFT - RIGHT - 20) / (high - low)

    def at(gap: float) -> float:
        return round(LEFT + unit * (gap - low), 1)

    top, rows = 44, []
    for index, (arm, of_arm) in enumerate(gaps.items()):
        label, y = f"{mean(of_arm):+.1f} %", top + 8 + 30 * index
        rows.append(
            Dots(
                y=y,
                name=arm.replace(", bf16", "-bf16"),
                seeds=[at(gap) for gap in of_arm],
                mean=at(mean(of_arm)),
                label=label,
            )
        )
    bottom = top + 30 * len(rows)
    halves = [half / 2 for half in range(round(2 * low), round(2 * high) + 1)]
    ticks = [(at(half), f"{half:+g} %" if half else "bf16", half == 0) for half in halves]
    return _drawn(
        "dots", theme, height=bottom + 44, top=top, bottom=bottom, ticks=ticks, rows=rows,
        title="Validation loss over dense bf16 training",
        source="Lower is better. GPT-2-small shape, 50 million tokens. Circles: seeds. Bars: their mean.",
    )  # fmt: skip


def rates(theme: str) -> str:
    """Validation losses over the learning rate: a curve for each recipe and factor, a panel for each setting."""
    top, bottom, gap = 56, 336, 44
    width = (WIDTH - 2 * gap) / 2
    panels = []
    for place, (setting, name) in enumerate(losses.RATE_SETTINGS.items()):
        curves = losses.rate_curves(setting)
        left = gap + place * (width + gap)
        every = [loss for of_curve in curves.values() for loss in of_curve.values()]
        tried = sorted({rate for of_curve in curves.values() for rate in of_curve})
        # The legend lies above the curves.
        legend, low, high = 18 * len(curves) + 10, min(every), max(every)
        octave = (width - 40) / log2(tried[-1] / tried[0])

        def x(rate: float, left: float = left, first: float = tried[0], unit: float = octave) -> float:
            return round(left + 20 + unit * log2(rate / first), 1)

        def y(loss: float, low: float = low, high: float = high, legend: float = legend) -> float:
            return round(bottom - 10 - (bottom - 20 - top - legend) * (loss - low) / (high - low), 1)

        step = 0.1 if high - low < 0.6 else 0.2
        levels = [step * index for index in range(ceil(low / step), floor(high / step) + 1)]
        panels.append(
            Panel(
                left=left,
                right=left + width,
                name=name,
                levels=[(y(level), f"{level:.1f}") for level in levels],
                rates=[(x(rate), f"{rate:g}") for rate in tried],
                curves=[
                    Curve(
                        points=[(x(rate), y(loss)) for rate, loss in sorted(of_curve.items())],
                        name=f"{arm}, factor {factor:g}",
                        key=top + 8 + 18 * index,
                        ours=arm != losses.DENSE,
                        dashed=factor != 1,
                    )
                    for index, ((arm, factor), of_curve) in enumerate(curves.items())
                ],
            )
        )
    return _drawn(
        "curves", theme, height=bottom + 48, bottom=bottom, panels=panels,
        title="Validation loss over the learning rate",
        source="Lower is better. 16 million tokens, one seed. Factor: of the scale of the FFN's weights.",
    )  # fmt: skip


def pipeline(theme: str) -> str:
    """What becomes of a traced graph."""
    boxes, arrows, rows = [], [], []
    width, gap, top = 142, 23, 46
    for index, (label, stages) in enumerate(_STAGES):
        y = top + 92 * index
        rows.append((y - 8, label))
        for place, (name, does, ours) in enumerate(stages):
            x = place * (width + gap) + 1
            boxes.append(Box(x=x, y=y, width=width, name=name, does=does, ours=ours))
            if place:
                arrows.append((x - 17.5, y + 29))
    return _drawn(
        "pipeline", theme, height=top + 92 * len(_STAGES) - 4, boxes=boxes, arrows=arrows, rows=rows,
        title="From a traced graph to a training step", source="Green: sparse_compile. Grey: PyTorch.",
    )  # fmt: skip


CHARTS = {
    f"{chart.__name__}-{theme}.svg": (chart, theme) for chart in (speed, loss, rates, pipeline) for theme in THEMES
}
