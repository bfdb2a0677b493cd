"""A plan as a picture: memory over the order of execution, each block where an allocator without gaps would lay it."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from memopt.sizes import show_size
from memopt_export.plan import Block, Plan

_WIDTH, _HEIGHT = 1200, 560
_LEFT, _TOP, _RIGHT, _BOTTOM = 92, 56, 16, 44
_HUES = 12  # neighbouring blocks get unlike colours
_LABEL_PIXELS = 7  # one character of a block's name
_STYLE = """
svg { font: 12px system-ui, sans-serif; --ink: #1b1f24; --paper: #ffffff; --faint: #d5dae0; --peak: #c62828; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e6e9ed; --paper: #14171a; --faint: #3a4048; --peak: #ff8a80; } }
.paper { fill: var(--paper) } text { fill: var(--ink) } .grid { stroke: var(--faint) }
.title { font-size: 15px; font-weight: 600 }
.block { stroke: var(--paper); stroke-width: 0.6; fill-opacity: 0.85 }
.block:hover { fill-opacity: 1; stroke: var(--ink) }
.name { fill: #10151a; font-size: 11px; pointer-events: none }
.scratch { fill: var(--ink); fill-opacity: 0.35 }
.alive { fill: none; stroke: var(--ink); stroke-width: 1.2; pointer-events: none }
.peak { stroke: var(--peak); stroke-dasharray: 4 3; fill: none } .at { fill: var(--peak); font-weight: 600 }
"""


def draw(plan: Plan, *, title: str) -> str:
    """The picture as SVG text that stands alone: hovering over a block tells its name, size and steps."""
    placed = _lay_out(plan)
    top = max([*(offset + block.size_bytes for block, offset in placed), plan.activation_bytes, 1])
    scale = _Scale(max(len(plan.steps), 1), top)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<rect class="paper" width="{_WIDTH}" height="{_HEIGHT}"/>',
        f'<text class="title" x="{_LEFT}" y="22">{escape(_headline(plan, title))}</text>',
        *_grid(scale),
        *(_rectangle(block, offset, index, plan, scale) for index, (block, offset) in enumerate(placed)),
        *_scratch(plan, scale),
        _alive(plan, scale),
        *_peak(plan, scale),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


class _Scale:
    """Steps and bytes to pixels."""

    def __init__(self, steps: int, top_bytes: int) -> None:
        self.steps, self.top_bytes = steps, top_bytes

    def x(self, step: int) -> float:
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * step / self.steps, 2)

    def y(self, size_bytes: int) -> float:
        return round(_HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * size_bytes / self.top_bytes, 2)


def _lay_out(plan: Plan) -> list[tuple[Block, int]]:
    """Each block with its offset: the largest first, each at the lowest place that is free while it lives."""
    placed: list[tuple[Block, int]] = []
    for block in sorted(plan.blocks, key=lambda block: (-block.size_bytes, block.first)):
        offset = 0
        beside = (each for each in placed if each[0].first <= block.last and block.first <= each[0].last)
        for other, start in sorted(beside, key=lambda each: each[1]):
            if start - offset >= block.size_bytes:
                break
            offset = max(offset, start + other.size_bytes)
        if block.size_bytes:
            placed.append((block, offset))
    return placed


def _headline(plan: Plan, title: str) -> str:
    least = "at least " if plan.unknown else ""
    need = f"{least}{show_size(plan.activation_bytes)} of activations at batch {plan.batch}"
    return f"{title}: {need}, as run by {plan.by}"


def _grid(scale: _Scale) -> Iterator[str]:
    """Lines at round sizes, with what they are; the first and last step."""
    for size in _round_sizes(scale.top_bytes):
        y = scale.y(size)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{show_size(size) if size else "0"}</text>'
    middle = (_LEFT + _WIDTH - _RIGHT) // 2
    told = f"{scale.steps} nodes in the order of execution"
    yield f'<text x="{middle}" y="{_HEIGHT - 14}" text-anchor="middle">{told}</text>'


def _round_sizes(top_bytes: int) -> list[int]:
    """Multiples of a power of two, four to eight of them.

    >>> _round_sizes(1000)
    [0, 128, 256, 384, 512, 640, 768, 896]
    """
    step = 1
    while top_bytes // step >= 8:
        step *= 2
    return list(range(0, top_bytes + 1, step))


def _rectangle(block: Block, offset: int, index: int, plan: Plan, scale: _Scale) -> str:
    left, right = scale.x(block.first), scale.x(block.last + 1)
    high, low = scale.y(offset + block.size_bytes), scale.y(offset)
    hue = 360 * (index * 5 % _HUES) // _HUES
    first, last = plan.steps[block.first][0], plan.steps[block.last][0]
    told = f"{block.tensor}: {show_size(block.size_bytes)}, from {first} to {last}"
    drawn = (
        f'<rect class="block" x="{left}" y="{high}" width="{right - left:.2f}" height="{low - high:.2f}" '
        f'fill="hsl({hue} 55% 68%)"><title>{escape(told)}</title></rect>'
    )
    if low - high >= 14 and (right - left) >= _LABEL_PIXELS * len(block.tensor):
        drawn += f'<text class="name" x="{left + 4}" y="{(high + low) / 2 + 4:.2f}">{escape(block.tensor)}</text>'
    return drawn


def _scratch(plan: Plan, scale: _Scale) -> Iterator[str]:
    """What kernels take while they run, on top of what is alive."""
    for step, size in enumerate(plan.scratch):
        if not size:
            continue
        name, total = plan.steps[step]
        high, low = scale.y(total), scale.y(total - size)
        yield (
            f'<rect class="scratch" x="{scale.x(step)}" y="{high}" width="{scale.x(step + 1) - scale.x(step):.2f}" '
            f'height="{low - high:.2f}"><title>{escape(f"{name} takes {show_size(size)} while it runs")}</title></rect>'
        )


def _alive(plan: Plan, scale: _Scale) -> str:
    """The sum alive at each step."""
    totals = enumerate(total for _, total in plan.steps)
    corners = [f"{scale.x(at)},{scale.y(total)}" for step, total in totals for at in (step, step + 1)]
    return f'<polyline class="alive" points="{" ".join(corners)}"/>'


def _peak(plan: Plan, scale: _Scale) -> Iterator[str]:
    x = (scale.x(plan.peak_step) + scale.x(plan.peak_step + 1)) / 2
    y = scale.y(plan.activation_bytes)
    anchor = "start" if x < _WIDTH / 2 else "end"
    yield f'<path class="peak" d="M{x} {_HEIGHT - _BOTTOM}V{_TOP - 8}M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>'
    told = f"peak {show_size(plan.activation_bytes)} at {plan.peak_node}"
    yield f'<text class="at" x="{x}" y="{_TOP - 14}" text-anchor="{anchor}">{escape(told)}</text>'
