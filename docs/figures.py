"""Draws the site's figures with the project's own code: `python docs/figures.py` writes them to docs/images, and
`python docs/figures.py runs/numbers` those of a run of configs/numbers.py.

forward.png      what q does to two pictures
schedules.png    the noise schedules side by side
unet.svg         the paper's CIFAR-10 network, box for box, as the linen module is called
numbers_*.png    what a run draws of prompts
"""

import dataclasses
import html
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

import ddpm_jax
from configs import cifar10
from ddpm_jax import config as config_lib
from ddpm_jax.data import digits
from ddpm_jax.data.numbers import in_words
from ddpm_jax.diffusion.gaussian import q_sample
from ddpm_jax.diffusion.schedules import SCHEDULES, make_schedule
from ddpm_jax.models import blocks
from ddpm_jax.runtime.images import to_float, to_uint8

IMAGES = Path(__file__).parent / "images"
TIMESTEPS = (0, 50, 100, 200, 300, 500, 700, 999)


def main(folder: Path = IMAGES) -> None:
    matplotlib.use("Agg")
    draw_forward(folder / "forward.png")
    draw_schedules(folder / "schedules.png")
    (folder / "unet.svg").write_text(unet_svg(cifar10.get_config()))


def main_of_run(workdir: str, folder: Path = IMAGES) -> None:
    matplotlib.use("Agg")
    run = ddpm_jax.load(workdir)
    held_out = run.dataset["held_out"]

    def drawn(count: int, number: int, scale: float = 2.0) -> np.ndarray:
        return run.sample(count, prompts=[in_words(number)], guidance_scale=scale, batch_size=count)

    def name(number: int) -> str:
        return in_words(number) + "*" * (number in held_out)

    asked = (10, 17, 25, 36, 42, 58, 63, 71, 84, 99)
    draw_table(folder / "numbers_prompts.png", [drawn(3, number) for number in asked], [*map(name, asked)])
    scales, chosen = (0.0, 1.0, 2.0, 4.0, 8.0), (36, 42, 71)
    of_scales = [np.concatenate([drawn(1, number, scale) for number in chosen]) for scale in scales]
    draw_table(folder / "numbers_guidance.png", of_scales, [f"{s:g}" for s in scales], [*map(name, chosen)])
    way = run.between(3, prompts=[in_words(11), in_words(99)], guidance_scale=2.0)
    draw_table(folder / "numbers_between.png", list(way.swapaxes(0, 1)), [f"{w:.1f}" for w in np.linspace(0, 1, 11)])
    draw_table(folder / "numbers_held_out.png", [drawn(5, number) for number in held_out], [*map(in_words, held_out)])


def draw_table(path: Path, columns: list[np.ndarray], titles: list[str], names: list[str] | None = None) -> None:
    """Pictures column by column under their titles, with names before the rows."""
    from matplotlib import pyplot as plt

    rows, wide = len(columns[0]), len(columns)
    figure, axes = plt.subplots(rows, wide, figsize=(1.2 * wide, 0.66 * rows + 0.3), squeeze=False)
    for column, pictures, title in zip(axes.T, columns, titles, strict=True):
        column[0].set_title(title, fontsize=8)
        for axis, picture in zip(column, pictures, strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    for axis, text in zip(axes[:, 0], names or [""] * rows, strict=True):
        axis.set_ylabel(text, fontsize=8, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# The forward process.


def pictures() -> list[np.ndarray]:
    """A photograph of 64x64 and an embedded digit of 8x8, uint8 [H, W, C]."""
    photograph = Image.fromarray(load_sample_image("china.jpg"))
    left = (photograph.width - photograph.height) // 2
    square = photograph.crop((left, 0, left + photograph.height, photograph.height)).resize((64, 64), Image.LANCZOS)
    return [np.asarray(square), digits.load()[0][3]]


def draw_forward(path: Path) -> None:
    from matplotlib import pyplot as plt

    schedule = make_schedule("linear")
    figure, axes = plt.subplots(2, len(TIMESTEPS) + 1, figsize=(11, 2.9))
    for row, picture in zip(axes, pictures(), strict=True):
        x_0 = jnp.broadcast_to(to_float(picture), (len(TIMESTEPS), *picture.shape))
        noise = jax.random.normal(jax.random.key(0), x_0.shape[1:])  # the same for all, so that only t differs
        x_t = q_sample(schedule, x_0, jnp.array(TIMESTEPS), jnp.broadcast_to(noise, x_0.shape))
        for axis, image in zip(row, [picture, *to_uint8(x_t)], strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.axis("off")
    axes[0, 0].set_title("$x_0$", fontsize=11)
    for axis, t in zip(axes[0, 1:], TIMESTEPS, strict=True):
        abar = float(schedule.alphas_cumprod[t])
        axis.set_title(f"$t = {t}$\n" + rf"$\bar\alpha_t = {abar:.5f}$", fontsize=9)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# The schedules.


def draw_schedules(path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for number, name in enumerate(SCHEDULES):
        schedule = make_schedule(name)
        abar, log_snr = np.asarray(schedule.alphas_cumprod), np.asarray(schedule.log_snr)
        style = {"color": f"C{number}", "linestyle": ("-", "--", ":", "-.")[number % 4], "label": name}
        left.plot(abar, **style)
        right.plot(np.where(log_snr > -40, log_snr, np.nan), **style)
    left.set(title=r"$\bar\alpha_t$: the share of $x_0$'s power in $x_t$", xlabel="t", xlim=(0, 999), ylim=(0, 1))
    right.set(title=r"$\log(\bar\alpha_t\,/\,(1 - \bar\alpha_t))$: log-SNR", xlabel="t", xlim=(0, 999), ylim=(-15, 12))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    right.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


# The network.


@dataclasses.dataclass(frozen=True)
class Block:
    """One call of a part of the network.

    Attributes:
      name: of the linen module in the UNet.
      kind: of the module: "ResBlock", "AttentionBlock", "Conv", ...
      channels: of the input, those of a skip connection with it.
      shape: [H, W, C] of the output; [C] of the time embedding's layers.
      parameters: how many.
      skip: the name of the block whose output a skip connection brings, or None.
    """

    name: str
    kind: str
    channels: int
    shape: tuple[int, ...]
    parameters: int
    skip: str | None


def unet_blocks(config: Any) -> list[Block]:
    """The parts of a config's network in the order in which they are called, found by calling it on shapes alone."""
    net = config_lib.make_network(config)
    found: list[Block] = []
    made_by: dict[int, str] = {}
    alive: list[Any] = []  # so that no identity is used twice

    def watch(call, args, kwargs, context):
        output = call(*args, **kwargs)
        module = context.module
        if len(module.path) == 1 and context.method_name == "__call__":
            skip = args[2] if isinstance(module, blocks.ResBlock) and len(args) > 2 else None
            channels = args[0].shape[-1] + (0 if skip is None else skip.shape[-1])
            skip_name = None if skip is None else made_by[id(skip)]
            name, kind = module.name, type(module).__name__
            found.append(Block(name, kind, channels, output.shape[1:], 0, skip_name))
            made_by[id(output)] = name
            alive.append(output)
        return output

    def run() -> Any:
        x = jnp.zeros((1, config.data.height, config.data.width, config.data.channels))
        with nn.intercept_methods(watch):
            return net.init(jax.random.key(0), x, jnp.zeros(1, jnp.int32))

    params = jax.eval_shape(run)["params"]
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}
    return [dataclasses.replace(block, parameters=sizes.get(block.name, 0)) for block in found]


WIDTH, HEIGHT, GAP = 152, 40, 16  # of a box, and between two
STEP = HEIGHT + GAP
COLOURS = {"ResBlock": "#a8c8ec", "AttentionBlock": "#f6c28b", "Downsample": "#b9e0b0", "Upsample": "#b9e0b0"}
LABELS = {
    "AttentionBlock": "attention",
    "Conv": "conv 3x3",
    "Dense": "dense",
    "Downsample": "down 3x3",
    "GroupNorm": "norm, swish",
    "Upsample": "up 3x3",
}


def unet_svg(config: Any) -> str:
    """The encoder on the left, downwards; the decoder on the right, upwards; a row for each skip connection."""
    found = {block.name: block for block in unet_blocks(config)}
    encoder, decoder = 84, 84 + 3 * (WIDTH + GAP)
    enters, leaves = encoder + WIDTH / 2, decoder + WIDTH / 2
    rows = _rows(found)
    top = 3 * STEP + GAP
    bottom = top + len(rows) * STEP
    width, height = decoder + 3 * (WIDTH + GAP), bottom + STEP

    total = sum(block.parameters for block in found.values())
    parts = list(_bands(rows, top, width))
    parts.append(_text(encoder, 28, f"The UNet of configs/cifar10.py: {total:,} parameters", 15, "start", "bold"))
    parts += _chain([found["time_0"], found["time_1"]], encoder + WIDTH + GAP, STEP)
    parts.append(_arrow((enters + 50, STEP + HEIGHT / 2), (encoder + WIDTH + GAP, STEP + HEIGHT / 2)))
    parts.append(_text(enters, STEP + HEIGHT / 2 + 4, "t, as sinusoids", 12))
    parts.append(_arrow((decoder - GAP, STEP + HEIGHT / 2), (decoder + 4, STEP + HEIGHT / 2)))
    parts.append(_text(decoder + 10, STEP + HEIGHT / 2 + 4, "swish, then to every ResBlock", 12, "start"))
    image = " x ".join(map(str, (config.data.height, config.data.width, config.data.channels)))
    parts.append(_text(enters, top - 34, f"x_t: {image}", 12))
    parts.append(_arrow((enters, top - 28), (enters, top)))
    for number, (down, up) in enumerate(rows):
        y = top + number * STEP
        start = encoder + len(down) * (WIDTH + GAP) - GAP
        parts.append(_arrow((start, y + HEIGHT / 2), (decoder, y + HEIGHT / 2), kind="skip"))
        parts += [*_chain(down, encoder, y), *_chain(up, decoder, y)]
        parts.append(_elbow(start - WIDTH / 2, y + HEIGHT, enters, y + STEP))
        parts.append(_elbow(decoder + len(up) * (WIDTH + GAP) - GAP - WIDTH / 2, y, leaves, y - GAP))
    middle = [block for block in found.values() if block.name.startswith("middle")]
    parts += _chain(middle, encoder, bottom)
    end = encoder + len(middle) * (WIDTH + GAP) - GAP
    parts.append(f'<path class="flow" d="M{end} {bottom + HEIGHT / 2} H{leaves} V{bottom - GAP}"/>')
    parts += _chain([found["norm_out"], found["conv_out"]], decoder, top - STEP)
    end = decoder + 2 * (WIDTH + GAP)
    parts.append(_arrow((end - GAP, top - STEP + HEIGHT / 2), (end + 4, top - STEP + HEIGHT / 2)))
    parts.append(_text(end + 10, top - STEP + HEIGHT / 2 + 4, f"eps: {image}", 12, "start"))
    return _document(width, height, parts)


def _rows(found: dict[str, Block]) -> list[tuple[list[Block], list[Block]]]:
    """For each skip connection, from the full size down: the blocks that it comes from and those that it goes to, each
    a residual block or a resampling with what follows it in its row."""
    chains: list[list[Block]] = []
    for block in found.values():
        if block.kind in ("AttentionBlock", "Upsample"):
            chains[-1].append(block)
        else:
            chains.append([block])
    ends = {chain[-1].name: chain for chain in chains}
    return [(ends[chain[0].skip], chain) for chain in reversed(chains) if chain[0].skip]


def _bands(rows: list[tuple[list[Block], list[Block]]], top: float, width: float) -> Iterator[str]:
    """A stripe for each size that the decoder's residual blocks work at."""
    sizes = [up[0].shape[:2] for _, up in rows]
    for number, size in enumerate(dict.fromkeys(sizes)):
        y, count = top + sizes.index(size) * STEP - GAP / 2, sizes.count(size)
        count += size == sizes[-1]  # and the middle
        yield f'<rect y="{y}" width="{width}" height="{count * STEP}" fill="{("#f7f7f7", "#ebebeb")[number % 2]}"/>'
        yield _text(42, y + count * STEP / 2 + 4, f"{size[0]} x {size[1]}", 13, weight="bold")


def _chain(chain: list[Block], x: float, y: float) -> Iterator[str]:
    """Boxes from left to right, with an arrow between two."""
    for number, block in enumerate(chain):
        if number:
            yield _arrow((x - GAP, y + HEIGHT / 2), (x, y + HEIGHT / 2))
        colour = COLOURS.get(block.kind, "#d9d9d9")
        yield f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="4" fill="{colour}" stroke="#555"/>'
        label = LABELS.get(block.kind, block.kind)
        yield _text(x + WIDTH / 2, y + 17, f"{label}  {block.channels} \u2192 {block.shape[-1]}", 12)
        yield _text(x + WIDTH / 2, y + 32, f"{' x '.join(map(str, block.shape))}  \u00b7  {block.parameters:,}", 10)
        x += WIDTH + GAP


def _text(x: float, y: float, text: str, size: int, anchor: str = "middle", weight: str = "normal") -> str:
    style = f'font-size="{size}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x}" y="{y}" {style}>{html.escape(text)}</text>'


def _arrow(start: tuple[float, float], end: tuple[float, float], kind: str = "flow") -> str:
    return f'<path class="{kind}" d="M{start[0]} {start[1]} L{end[0]} {end[1]}"/>'


def _elbow(x: float, y: float, x_end: float, y_end: float) -> str:
    """Half of the way up or down, then to the side, then the rest."""
    return f'<path class="flow" d="M{x} {y} V{(y + y_end) / 2} H{x_end} V{y_end}"/>'


def _document(width: float, height: float, parts: list[str]) -> str:
    head = (
        '<path d="M0 0 L8 4 L0 8 z" fill="#333"/>',
        "text { font-family: system-ui, Helvetica, Arial, sans-serif; fill: #111; }",
        "path.flow, path.skip { fill: none; stroke: #333; stroke-width: 1.2; marker-end: url(#head); }",
        "path.skip { stroke-dasharray: 5 4; stroke: #888; }",
    )
    marker = '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<defs>{marker}{head[0]}</marker><style>{chr(10).join(head[1:])}</style></defs>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main_of_run(sys.argv[1]) if len(sys.argv) > 1 else main()
