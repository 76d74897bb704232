"""The elementwise linear recurrence."""

from pallas_kernels.gpu.limits import CORES, WIDTH

SHORTEST = 256  # steps of a piece of time on GPU


def pieces(batch: int, length: int, width: int) -> int:
    """Return how many pieces time is cut into on GPU: a power of two that divides it.

    A thread block has about 50 KiB on their way to it and the memory of an H100 wants 3.4 MB, what
    it delivers in a microsecond: some 70 thread blocks keep it busy. Two passes move 5 arrays where
    one moves 3, so that they pay off where less than three fifths of that are there: below a third
    of the multiprocessors. Then there are pieces until each has a thread block or two.
    """
    blocks = batch * -(-width // WIDTH)
    count = 1
    if 3 * blocks < CORES:
        while length % (2 * count) == 0 and length // (2 * count) >= SHORTEST:
            if 2 * count * blocks > 2 * CORES:
                break
            count *= 2
    return count


def faster_on_gpu(batch: int, length: int, width: int) -> bool:
    """Return whether the GPU kernel is expected to beat XLA's associative scan.

    A thread block takes its steps in order, about 60 ns each on an H100 ([32, 1024, 256]). Few
    thread blocks with many steps each therefore lose against a scan that uses the whole chip. The
    limits, 1024 steps or a third of the multiprocessors, are estimates from that rate.
    """
    count = pieces(batch, length, width)
    return length // count <= 1024 or 3 * count * batch * -(-width // WIDTH) >= CORES
