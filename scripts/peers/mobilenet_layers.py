"""MobileNetV2 to its 320-channel stage, layer by layer, from its paper's table: what the peers are built from."""

STAGES = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
TAPS = (6, 13, 17)


def layers():
    """(our name, kind, in, out, stride, block number, is the block's input added) per convolution."""
    out = [("stem", "full", 3, 32, 2, 0, False)]
    channels, number = 32, 0
    for t, c, n, s in STAGES:
        for i in range(n):
            number += 1
            stride = s if i == 0 else 1
            hidden = channels * t
            if t != 1:
                out.append((f"blocks.{number}.expand", "point", channels, hidden, 1, number, False))
            out.append((f"blocks.{number}.depthwise", "depth", hidden, hidden, stride, number, False))
            out.append((f"blocks.{number}.project", "linear", hidden, c, 1, number, stride == 1 and channels == c))
            channels = c
    return out


def pads(size, stride, same):
    """Borders (top, left, bottom, right) of a 3x3 convolution, and its output's size."""
    border = [1, 1, 1, 1]
    if same:
        total = [max((-(-n // stride) - 1) * stride + 3 - n, 0) for n in size]
        border = [total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2]
    return border, tuple((n + border[i] + border[i + 2] - 3) // stride + 1 for i, n in enumerate(size))
