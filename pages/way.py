"""The picture in docs/concepts.md: which layers one token runs in a small model at one budget, as SVG."""

from xml.sax.saxutils import escape

from buddy.budget import executed_layers

LAYERS, BUDGET = 8, 0.625
SCORES = (0.9, 0.2, 0.7, 0.1, 0.8, 0.4)  # of the routable layers
WIDTH, TOP, STEP, TALL = 600, 106, 62, 40
LEFT, BROAD = 92, 196  # of the layers' boxes
LINE, ASIDE, BARS = LEFT + BROAD // 2, 40, 350  # the token's way, its way past a layer, where the bars of scores begin
STYLE = """
    .paper { fill: #ffffff; } text { font: 16px sans-serif; fill: #1d2433; } .small { font-size: 14px; fill: #4c566a; }
    .run { fill: #dbe7ff; stroke: #3563c9; stroke-width: 2; }
    .skip { fill: none; stroke: #8a93a6; stroke-dasharray: 5 4; }
    .way { fill: none; stroke: #c2410c; stroke-width: 3; } .tip { fill: #c2410c; }
    .router { fill: #e3f4e8; stroke: #23803f; stroke-width: 2; } .bar { fill: #23803f; } .low { fill: #a7b0bf; }
    .sees { fill: none; stroke: #23803f; stroke-width: 2; } .eye { fill: #23803f; }
    @media (prefers-color-scheme: dark) {
      .paper { fill: #1b2030; } text { fill: #e8ebf2; } .small { fill: #b3bccb; }
      .run { fill: #263a68; stroke: #8fb0ff; } .skip { stroke: #8a93a6; }
      .way { stroke: #ff9a5c; } .tip { fill: #ff9a5c; }
      .router { fill: #1d4029; stroke: #6fd08c; } .bar { fill: #6fd08c; } .low { fill: #5d6678; }
      .sees { stroke: #6fd08c; } .eye { fill: #6fd08c; }
    }"""
ABOUT = (
    "A token enters layer 0, which always runs. From what that layer cached the router gives a score to each of the "
    "layers 1 to 6. The best-scored ones run, the token goes past the others, and the last layer always runs."
)


def picture() -> str:
    """The whole SVG file."""
    count = executed_layers(BUDGET, LAYERS, 2)
    best = sorted(range(len(SCORES)), key=lambda index: -SCORES[index])[: count - 2]
    runs = [True, *(index in best for index in range(len(SCORES))), True]
    bottom = _y(LAYERS - 1) + TALL
    parts = [
        _words(LINE, 36, f"budget {BUDGET} of {LAYERS} layers: K = {count} run for this token", at="start", dx=-152)
    ]
    parts += [_words(LINE, 72, "a token"), *_way(runs), *(_layer(layer, on) for layer, on in enumerate(runs))]
    parts += [*_router(), *(_score(index, score, index in best) for index, score in enumerate(SCORES))]
    parts.append(_words(LINE, bottom + 50, "the next token's distribution"))
    parts.append(_words(BARS, bottom - 14, "runs for every token", "small", "start"))
    height = bottom + 72
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="t d">\n'
        f'  <title id="t">One token\'s way through the layers</title>\n  <desc id="d">{ABOUT}</desc>\n'
        f"  <style>{STYLE}\n  </style>\n"
        f'  <rect class="paper" width="{WIDTH}" height="{height}" rx="10"/>\n  ' + "\n  ".join(parts) + "\n</svg>\n"
    )


def _y(layer: int) -> int:
    return TOP + layer * STEP


def _words(x: int, y: int, text: str, kind: str = "", at: str = "middle", dx: int = 0) -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x + dx}" y="{y}" text-anchor="{at}">{escape(text)}</text>'


def _layer(layer: int, on: bool) -> str:
    name = f"layer {layer}" if on else f"layer {layer} skipped"
    box = f'<rect class="{"run" if on else "skip"}" x="{LEFT}" y="{_y(layer)}" width="{BROAD}" height="{TALL}" rx="6"/>'
    return f"{box}{_words(LINE, _y(layer) + 26, name, '' if on else 'small')}"


def _way(runs: list[bool]) -> list[str]:
    """The line from box to box, and past those that are skipped."""
    drawn, y = [], TOP - 26
    for layer, on in enumerate(runs):
        top, below = _y(layer), _y(layer) + TALL
        if on:
            drawn += [f'<path class="way" d="M{LINE} {y}V{top - 6}"/>', _tip(top)]
            y = below
        else:
            path = f"M{LINE} {y}V{top - 11}H{ASIDE}V{below + 11}H{LINE}"
            drawn.append(f'<path class="way" stroke-linejoin="round" d="{path}"/>')
            y = below + 11
    return [*drawn, f'<path class="way" d="M{LINE} {y}V{y + 20}"/>', _tip(y + 26)]


def _tip(y: int) -> str:
    return f'<path class="tip" d="M{LINE - 6} {y - 9}H{LINE + 6}L{LINE} {y}Z"/>'


def _router() -> list[str]:
    y, end = _y(0), LEFT + BROAD
    return [
        f'<rect class="router" x="{BARS}" y="{y}" width="{WIDTH - BARS - 24}" height="{TALL}" rx="6"/>',
        _words((BARS + WIDTH - 24) // 2, y + 26, "router: a score for each"),
        f'<path class="sees" d="M{end} {y + TALL // 2}H{BARS - 8}"/>',
        f'<path class="eye" d="M{BARS - 10} {y + TALL // 2 - 6}V{y + TALL // 2 + 6}L{BARS - 1} {y + TALL // 2}Z"/>',
        _words((end + BARS) // 2, y + 10, "cache", "small"),
    ]


def _score(index: int, score: float, best: bool) -> str:
    y, long = _y(index + 1) + 8, round(150 * score)
    bar = f'<rect class="{"bar" if best else "low"}" x="{BARS}" y="{y}" width="{long}" height="24" rx="3"/>'
    return bar + _words(BARS + long + 10, y + 18, f"{score}", "small", "start")
